"""What reduced decoding of JPEGs costs and saves, and how fast a dataset of shards starts.

    python benchmarks/data.py --images FOLDER [--sizes 32 64 128 256] [--repeat 3]     # JPEGs
    python benchmarks/data.py --shards 1000 [--per_shard 1281]                         # of tiny images with .cls, made and removed

For each size: the PSNR between training images (the same random crops) from JPEGs decoded at reduced scale and whole, over the images that
are reduced, and the seconds to read each image once both ways, in one process.
"""

import argparse
import io
import math
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image

from dataset import ImageDataset, make_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of JPEGs")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--repeat", type=int, default=3, help="the fastest of so many times")
    parser.add_argument("--shards", type=int)
    parser.add_argument("--per_shard", type=int, default=1281)
    args = parser.parse_args()
    if args.images:
        for size in args.sizes:
            print(reduced(args, size))
    if args.shards:
        with tempfile.TemporaryDirectory() as folder:
            starts(args, Path(folder))


def reduced(args: argparse.Namespace, size: int) -> str:
    data = make_dataset("folder", str(args.images), image_size=size, val_fraction=0)
    least, images, seconds = data.least, {}, {}
    for way, data.least in (("reduced", least), ("whole", 0)):
        images[way], seconds[way] = read(data), min(clock(lambda: read(data)) for _ in range(args.repeat))
    errors = [(a - b).square().mean().item() for a, b in zip(images["reduced"], images["whole"])]
    psnr = [10 * math.log10(4 / e) for e in errors if e]
    text = f"{size} x {size}: {len(psnr)} of {len(data)} images reduced"
    text += f", PSNR {sum(psnr) / len(psnr):.1f} dB on average, {min(psnr):.1f} dB at least" if psnr else ""
    return f"{text}; {1e3 * seconds['reduced'] / len(data):.2f} ms against {1e3 * seconds['whole'] / len(data):.2f} ms per image, " \
           f"{seconds['whole'] / seconds['reduced']:.2f} x"


def read(data: ImageDataset) -> list:
    return [data[1, i][0] for i in range(len(data))]


def starts(args: argparse.Namespace, folder: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "png")
    for shard in range(args.shards):
        with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as tar:
            for i in range(args.per_shard):
                for name, data in ((f"{i:06d}.png", file.getvalue()), (f"{i:06d}.cls", str(shard % 1000).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    for start in ("first", "second"):
        seconds = clock(lambda: make_dataset("webdataset", str(folder)))
        print(f"{start} start with {args.shards} shards of {args.per_shard} images: {seconds:.1f} s")
    index = sum(path.stat().st_size for path in (folder / "cache").rglob("*.json"))
    print(f"index: {index / 1e6:.1f} MB")


def clock(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
