"""The features by which evaluate.py compares images: networks, distances, files of statistics.

    Reconstructions         how far they are from the images, while a model learns
    load_inception          the network of FID, of the TensorFlow release
    inception_features      its features of images
    lite2_features          those of EfficientNet-Lite2 (losses.load_efficientnet_lite), whose
                            weights come with a package
    synsets                 ImageNet's numbers of classes
    gaussians, distances    the Gaussians of features; the distances of Frechet between them
    precision_and_recall, inception_score    of samples
    load_reference, save_statistics    .npz files in the format of the ADM suite: `mu`, `sigma`,
                            `mu_s`, `sigma_s`, `arr_0`

Inception's features (N, FEATURES + SPATIAL) are those of FID, then those of sFID. A Gaussian is
{"mu": (D,), "sigma": (D, D)}; several are kept by the distance that they are for,
{"fid": ..., "sfid": ...} or {"fd": ...}.
"""

import io
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from harness.checkpoint import write_file
from harness.config import UserError
from harness.metrics import collect
from losses import load_efficientnet_lite

FEATURES = 2048  # numbers for an image
SPATIAL = 7 * 17 * 17
PARTS = {  # of the features, by network and by the distance that they are for
    "inception": {"fid": slice(FEATURES), "sfid": slice(FEATURES, None)},
    "efficientnet_lite2": {"fd": slice(None)},
}
SIDE = 192  # to which images are scaled for EfficientNet-Lite2
ENDINGS = {"fid": "", "sfid": "_s"}  # of names in a file


class Reconstructions:
    """The Frechet distance of reconstructions from `count` images, of all processes, measured again
    and again: the images' features are computed once. `name` is the metric's, rfid or rfd."""

    def __init__(self, features, device, count):
        if count < 2:
            raise ValueError("train.validation_features needs two validation images or more; raise "
                             "train.num_validation_images, or data.val_fraction")
        if features == "inception":
            network = load_inception("train.validation_features=null")
            features_of = inception_features
        else:
            network = load_efficientnet_lite(2)
            features_of = lite2_features
        self.see = partial(features_of, network.to(device))
        distance, self.part = next(iter(PARTS[features].items()))
        self.name = f"r{distance}"
        self.of_images = []
        self.of_reconstructions = []
        self.knows_images = False

    def add(self, images, reconstructions):
        """Two batches, uint8 (B, 3, H, W)."""
        if not self.knows_images:
            self.of_images.append(self.see(images)[0][:, self.part])
        self.of_reconstructions.append(self.see(reconstructions)[0][:, self.part])

    def distance(self):
        """Of all batches since the last call; on the first process (others: nan)."""
        if not self.knows_images:
            self.of_images = collect(self.of_images)
            self.knows_images = True
        features = collect(self.of_reconstructions)
        self.of_reconstructions = []
        if features is None:
            return math.nan
        return frechet_distance(statistics(features), statistics(self.of_images))


def load_inception(instead="--without inception"):
    """The network of FID and the Inception Score, with the weights of the TensorFlow release.
    FileNotFoundError if they are neither on disk nor to be downloaded; the message suggests
    `instead`."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (
            URL_INCEPTION_V3, FeatureExtractorInceptionV3)
    except ImportError as error:
        raise FileNotFoundError(f"the package torch-fidelity is missing ({error}); install it, or "
                                f"do without by {instead}") from error
    folder, _, name = URL_INCEPTION_V3.rpartition("/")
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                           verbose=False)
    except (OSError, RuntimeError) as error:  # no network, or a file that was cut short
        raise FileNotFoundError(
            f"Inception's weights could not be downloaded ({error}); put the file {name} "
            f"({folder}) into {torch.hub.get_dir()}/checkpoints, or do without by {instead}"
        ) from error


def inception_features(network, images):
    """Of uint8 images (B, 3, H, W): features (B, FEATURES + SPATIAL) and logits without bias
    (B, 1008), on the CPU.

    The spatial ones are of TensorFlow's mixed_6/conv, in its order (h, w, channel), or statistics
    of others would not fit.
    """
    outputs = []
    layer = network.Mixed_6d.branch1x1
    with layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output)):
        pool, logits = network(images.to(next(network.parameters()).device))
    spatial = outputs[0][:, :7].permute(0, 2, 3, 1).flatten(1)          # (B, SPATIAL)
    return torch.cat([pool, spatial], 1).cpu(), logits.cpu()


def lite2_features(network, images):
    """Of uint8 images (B, 3, H, W): features (B, 1280), which its last layer reads, and logits
    (B, 1000) of ImageNet's classes, on the CPU."""
    images = images.to(next(network.parameters()).device).float() - 127.5
    images = F.interpolate(images / 128, (SIDE, SIDE), mode="bicubic", antialias=True)
    images = images.contiguous(memory_format=torch.channels_last)  # 1.7 times faster on CPUs
    features = network.extract_features(images).mean((2, 3))
    return features.cpu(), network._fc(features).cpu()


def imagenet_numbers(dataset):
    """The numbers of a dataset's classes in ImageNet, or None if one of them is not the WordNet
    number of a class of it, such as n01440764."""
    known_as = getattr(dataset.source, "synsets", {})
    names = [known_as.get(name, name) for name in dataset.classes]
    known = (Path(__file__).parent.parent / "data/imagenet_synsets.txt").read_text().split()
    if not names or not {*names} <= {*known}:
        return None
    return torch.tensor([known.index(name) for name in names])


def statistics(features):
    """The Gaussian of features (N, D), in float64."""
    if len(features) < 2:
        raise UserError("a Frechet distance needs at least two images on each side")
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return fid_features_to_statistics(features.double())


def gaussians(features, parts):
    """The Gaussian of each of the parts."""
    return {name: statistics(features[:, part]) for name, part in parts.items()}


def frechet_distance(a, b):
    """The distance of two Gaussians."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    return fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]


def distances(features, parts, real):
    """The distance of each of the parts of features (N, D), as far as there are such Gaussians."""
    return {name: frechet_distance(statistics(features[:, part]), real[name])
            for name, part in parts.items() if name in real}


def precision_and_recall(features, real, network):
    """Of this network's features (N, D) of samples and (M, D) of real images."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    check_neighbours(len(features), len(real), network)
    balls = prc_features_to_metric(features, real, save_cpu_ram=True, verbose=False)
    return {"precision": balls["precision"], "recall": balls["recall"], "samples": len(features)}


def inception_score(logits):
    """Of logits (N, C) of samples."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    # In this order, the splits do not depend on the samples' order.
    logits = logits[np.lexsort(logits[:, :4].T.numpy())]
    score = isc_features_to_metric(logits, splits=min(10, len(logits)))
    return {"is": score["inception_score_mean"], "is_std": score["inception_score_std"]}


def check_neighbours(samples, images, network):
    if min(samples, images) < 4:
        raise UserError("precision and recall look at 3 nearest neighbours and need 4 samples and "
                        f"4 images; there are {samples} and {images} (--without {network} leaves "
                        "them out)")


def read_npz(path, *names):
    """{name: array}, for those names that the file has."""
    try:
        with np.load(path, allow_pickle=False) as file:  # an .npy gives an array, refused here
            # A member of the archive may be no array, and have no view.
            return {name: file[name].view() for name in names if name in file}
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except MemoryError:
        raise
    except Exception:  # numpy raises almost anything on a broken file
        raise UserError(f"{path} is not an .npz of images (`arr_0`) or statistics (`mu`, `sigma`) "
                        "that can be read") from None


def check_images(images, path, size):
    """UserError unless a file's `arr_0` are images of this size, (height, width)."""
    shape = *size, 3
    if images is None or images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
        problem = "not there" if images is None else f"{images.dtype} {images.shape}"
        raise UserError(f"`arr_0` of {path} is {problem}; it must be images of the size of those "
                        f"that it is compared with, uint8 (N, {size[0]}, {size[1]}, 3)")


def load_reference(path):
    """What a file in the ADM suite's format holds: Gaussians "fid" and "sfid", and "images", uint8
    (N, H, W, 3); each if it is there."""
    arrays = read_npz(path, "mu", "sigma", "mu_s", "sigma_s", "arr_0")
    reference = {}
    for name, ending in ENDINGS.items():
        keys = f"mu{ending}", f"sigma{ending}"
        if arrays.keys() >= {*keys}:
            mu, sigma = map(arrays.get, keys)
            size = FEATURES if name == "fid" else SPATIAL
            fits = mu.shape == (size,) and sigma.shape == (size, size)
            is_float = mu.dtype.kind == sigma.dtype.kind == "f"
            if not (fits and is_float and np.isfinite(mu.sum() + sigma.sum())):
                raise UserError(f"`{keys[0]}` and `{keys[1]}` of {path} are {mu.dtype} {mu.shape}, "
                                f"{sigma.dtype} {sigma.shape} instead of finite floats ({size},) "
                                f"and ({size}, {size}), so they are not of these features of "
                                "Inception")
            reference[name] = {"mu": np.float64(mu), "sigma": np.float64(sigma)}
    if "arr_0" in arrays:
        reference["images"] = arrays["arr_0"]
    elif "fid" not in reference:
        raise UserError(f"{path} holds neither statistics (`mu`, `sigma`) nor images (`arr_0`)")
    return reference


def save_statistics(path, real):
    """Writes Gaussians as load_reference reads them."""
    file = io.BytesIO()
    np.savez(file, **{key + ENDINGS[name]: array for name, gaussian in real.items()
                      for key, array in gaussian.items()})
    write_file(path, file.getvalue())
