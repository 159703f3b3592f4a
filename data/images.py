"""Image files: which there are, and their pixels.

    files_below          the files in folders, at any depth
    DataError            what is wrong with a user's images, in one sentence
    image_extensions     which of them are images
    read_image, decode   one of them as 8-bit RGB, whatever it is
"""

import functools
import io
import os
from contextlib import suppress
from heapq import heappop, heappush

import numpy as np
from PIL import Image, PngImagePlugin

BACKGROUND = "white"  # behind transparent images
NOT_IMAGES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "PCD", "WMF"}
PASSED_OVER = (".", "__MACOSX", "lost+found")  # files and folders whose names begin so
ORIENTATION = 0x0112  # in EXIF: how to turn the image upright, by TURNS, from 2
TURNS = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270",
         "TRANSVERSE", "ROTATE_90"]
# A PNG with more text, or a larger colour profile, is unreadable. Pillow's own limit is 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28



class DataError(Exception):
    """Something about the user's data, in one sentence."""

    def __init__(self, message):
        # A loader's worker process hands its exceptions over as a traceback in text, which ends
        # with the sentence.
        super().__init__(message.strip().rpartition("data.images.DataError: ")[2])


@functools.cache
def image_extensions():
    """The extensions (".jpg") of what this Pillow reads, without documents, films and data."""
    formats = Image.registered_extensions()
    readable = {"MPO", *Image.OPEN} - NOT_IMAGES  # "JPEG" opens MPO
    return {extension for extension, name in formats.items() if name in readable}


def files_below(extensions, *folders):
    """The files with such an extension in each folder, at any depth: their relative names, in
    order. And the names of all other files.

    A file is listed once: in the first folder that leads to it, under its own name rather than a
    link's. A link to a folder that it is in is not followed. PermissionError if a folder cannot be
    read.
    """
    listed, others = [], []
    visited = set()  # the paths of folders and files, without links
    for top in folders:
        names = []
        # A heap of (links on the way, name, path, whether it is a folder): fewest links first.
        pending = [(0, "", os.path.realpath(top), True)]
        while pending:
            links, name, path, is_folder = heappop(pending)
            if not is_folder and os.path.splitext(name)[1].lower() not in extensions:
                others.append(name)
            elif path not in visited:
                visited.add(path)
                if is_folder:
                    for item in _entries(links, name, path):
                        heappush(pending, item)
                else:
                    names.append(name)
        # A folder's files, those of its sub-folders, the next folder: "a/b" is before "a-b".
        names.sort(key=lambda name: (os.path.dirname(name).replace("/", "\0"), name))
        listed.append(names)
    return listed, others


def _entries(links, folder, path):
    """What is in a folder."""
    for entry in os.scandir(path):
        is_link = entry.is_symlink()
        target = os.path.realpath(entry) if is_link else entry.path
        is_around = f"{path}/".startswith(os.path.join(target, ""))
        if not is_around and not entry.name.startswith(PASSED_OVER):
            yield links + is_link, os.path.join(folder, entry.name), target, entry.is_dir()


def read_image(path, background=BACKGROUND):
    """The image as 8-bit RGB, upright (EXIF), over this colour where it is transparent."""
    return decode(path, background=background)[0]


def decode(file, least=0, background=BACKGROUND):
    """read_image, and where in it the picture is (left, top, width, height). A JPEG may be decoded
    at 1/2, 1/4 or 1/8, but to at least `least` pixels a side (0: whole); its last pixels then go
    beyond the picture."""
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        reduced = image.draft("RGB", (least, least)) if least else None  # None: no JPEG
        image.load()
        turn = None
        with suppress(Exception):  # a broken EXIF block
            turn = image.getexif().get(ORIENTATION)
        if image.mode[0] in "IF":
            image = _to_8_bits(image)
        elif image.has_transparency_data:
            image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        image = image.convert("RGB")
    width, height = reduced[1][2:] if reduced else image.size
    if turn in range(2, 9):
        image = image.transpose(Image.Transpose[TURNS[turn - 2]])
    if turn in (5, 6, 7, 8):
        width, height = height, width
    left = (image.width - width) * (turn in (2, 3, 6, 7))
    top = (image.height - height) * (turn in (3, 4, 7, 8))
    return image, (left, top, width, height)


def _to_8_bits(image):
    """A grey image of 16 bits (the high ones) or of floats from 0 to 1. ValueError for other
    numbers: nobody knows their white. What a PNG says is transparent becomes white."""
    values = np.asarray(image)
    if image.mode == "F" and values.min() >= 0 and values.max() <= 1:
        return Image.fromarray((values * 255).round().astype(np.uint8))
    if image.mode == "F" or (image.mode, image.format) == ("I", "TIFF"):
        raise ValueError("its pixels are not of 8 or 16 bits or floats from 0 to 1; convert it")
    bits = image.tag_v2[258][0] if image.format == "TIFF" else 16  # 12 or 16
    grey = (values >> bits - 8).astype(np.uint8)
    grey[values == image.info.get("transparency")] = 255
    return Image.fromarray(grey)
