"""Inception's side of an evaluation: features, what is computed from them, and the files of statistics that others compare with.

    load_inception, inception_features      the network of the TensorFlow release, and the features of images
    statistics, distances                   their Gaussian; FID and sFID
    sample_quality                          Inception Score, precision, recall
    load_reference, save_statistics         .npz files in the format of the ADM suite: `mu`, `sigma`, `mu_s`, `sigma_s`, `arr_0`
"""

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoint import write_file
from config import UserError

FEATURES, SPATIAL, LOGITS = 2048, 7 * 17 * 17, 1008  # how many numbers for an image


def load_inception() -> torch.nn.Module:
    """The network of FID and the Inception Score, with the weights of the TensorFlow release. FileNotFoundError if they are neither on
    disk nor to be downloaded."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError as error:
        raise FileNotFoundError(f"the package torch-fidelity is missing ({error}); install it, or do without by --without "
                                "inception") from error
    folder, _, name = URL_INCEPTION_V3.rpartition("/")
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], verbose=False)
    except (OSError, RuntimeError) as error:  # no network, or a file that was cut short
        raise FileNotFoundError(f"Inception's weights could not be downloaded ({error}); put the file {name} ({folder}) into "
                                f"{torch.hub.get_dir()}/checkpoints, or do without by --without inception") from error


def inception_features(network: torch.nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Of uint8 images (B, 3, H, W): features (B, FEATURES + SPATIAL) and logits without bias (B, 1008), on the CPU.

    The spatial ones are of TensorFlow's mixed_6/conv, in its order (h, w, channel), or statistics of others would not fit.
    """
    spatial = []

    def keep(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        spatial.append(output[:, :7].permute(0, 2, 3, 1).flatten(1))

    with network.Mixed_6d.branch1x1.register_forward_hook(keep):
        pool, logits = network(images.to(next(network.parameters()).device))
    return torch.cat([pool, *spatial], 1).cpu(), logits.cpu()


def statistics(features: Tensor) -> dict[str, np.ndarray]:
    """Mean `mu` (D,) and covariance `sigma` (D, D) of features (N, D), in float64."""
    if len(features) < 2:
        raise UserError("a Frechet distance needs at least two images on each side")
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return fid_features_to_statistics(features.double())


def frechet_distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Of Gaussians with these `mu` and `sigma`."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    return fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]


def distances(features: Tensor, real: dict) -> dict[str, float]:
    """FID and, if the other side has what it takes, sFID of Inception's features (N, FEATURES + SPATIAL)."""
    parts = {"fid": ("pool", features[:, :FEATURES]), "sfid": ("spatial", features[:, FEATURES:])}
    return {name: frechet_distance(statistics(part), real[of]) for name, (of, part) in parts.items() if of in real}


def sample_quality(features: Tensor, logits: Tensor, real: Tensor) -> dict[str, float]:
    """Inception Score, precision and recall, from Inception's features (N, D) and logits (N, C) of samples, and its features (M, D) of
    real images."""
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    logits = logits[np.lexsort(logits[:, :4].T.numpy())]  # the splits of the score then do not depend on the samples' order
    score = isc_features_to_metric(logits, splits=min(10, len(logits)))
    check_neighbours(len(features), len(real))
    found = prc_features_to_metric(features, real, save_cpu_ram=True, verbose=False)
    return {"is": score["inception_score_mean"], "is_std": score["inception_score_std"], "precision": found["precision"],
            "recall": found["recall"], "samples": len(features)}


def check_neighbours(samples: int, images: int) -> None:
    if min(samples, images) < 4:
        raise UserError(f"precision and recall look at 3 nearest neighbours and need 4 samples and 4 images; there are {samples} and "
                        f"{images} (--without inception leaves them out)")


def read_npz(path: str | Path, *names: str) -> dict[str, np.ndarray]:
    """Those of the arrays that the file has."""
    try:
        with np.load(path, allow_pickle=False) as file:  # an .npy gives an array, which `with` refuses
            return {name: file[name].view() for name in names if name in file}  # a member of the archive may be no array
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, EOFError, AttributeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"{path} is not an .npz of images (`arr_0`) or statistics (`mu`, `sigma`) that can be read") from None


def check_images(images: np.ndarray | None, path: str | Path, height: int, width: int) -> None:
    """UserError unless a file's `arr_0` are images of this size."""
    if images is None or images.dtype != np.uint8 or images.shape[1:] != (height, width, 3) or not len(images):
        found = "not there" if images is None else f"{images.dtype} {images.shape}"
        raise UserError(f"`arr_0` of {path} is {found}; it must be images of the size of those that it is compared with, "
                        f"uint8 (N, {height}, {width}, 3)")


def load_reference(path: str) -> dict:
    """What a file in the ADM suite's format holds: statistics "pool" (for FID) and "spatial" (for sFID), and "images", uint8 (N, H, W, 3);
    each if it is there."""
    arrays, found = read_npz(Path(path).expanduser(), "mu", "sigma", "mu_s", "sigma_s", "arr_0"), {}
    for name, (mu, sigma), size in (("pool", ("mu", "sigma"), FEATURES), ("spatial", ("mu_s", "sigma_s"), SPATIAL)):
        if mu in arrays and sigma in arrays:
            want, have = [(size,), (size, size)], [arrays[mu], arrays[sigma]]
            if [x.shape for x in have] != want or any(x.dtype.kind != "f" or not np.isfinite(x).all() for x in have):
                raise UserError(f"`{mu}` and `{sigma}` of {path} are {', '.join(f'{x.dtype} {x.shape}' for x in have)} instead of finite "
                                f"floats {want[0]} and {want[1]}, so they are not of these features of Inception")
            found[name] = {"mu": arrays[mu].astype(np.float64), "sigma": arrays[sigma].astype(np.float64)}
    if "arr_0" in arrays:
        found["images"] = arrays["arr_0"]
    elif "pool" not in found:
        raise UserError(f"{path} holds neither statistics (`mu`, `sigma`) nor images (`arr_0`)")
    return found


def save_statistics(path: Path, real: dict) -> None:
    """Writes statistics "pool" and "spatial", as load_reference reads them."""
    file = io.BytesIO()
    np.savez(file, mu=real["pool"]["mu"], sigma=real["pool"]["sigma"], mu_s=real["spatial"]["mu"], sigma_s=real["spatial"]["sigma"])
    write_file(path, file.getvalue())
