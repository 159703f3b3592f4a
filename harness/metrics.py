"""How good reconstructions are, and how a codebook is used.

    compare             PSNR, SSIM and LPIPS of each image
    usage, perplexity   of a codebook, from how often each code was used
    mean_and_spread     of a metric over the images
    collect             what all processes measured
"""

import math

import torch

from dataset import to_float


def compare(a, b, lpips=None):
    """How much two batches of uint8 images (B, 3, H, W) differ: "psnr", "ssim" and, with a network,
    "lpips", each (B,). Equal images have a PSNR of 100 dB."""
    import torchmetrics.functional.image as functional  # takes seconds

    settings = {"preds": b.float(), "target": a.float(), "data_range": 255.0, "reduction": "none"}
    psnr = functional.peak_signal_noise_ratio(**settings, dim=(1, 2, 3))
    _, ssim = functional.structural_similarity_index_measure(**settings, return_full_image=True)
    # Where the window of 11 pixels lies inside the image, as Wang et al. (2004) have it
    ssim = ssim[..., 5:-5, 5:-5].mean((1, 2, 3))
    values = {"psnr": psnr.clamp(max=100), "ssim": ssim}  # of no error at all: infinite
    if lpips:
        values["lpips"] = lpips(to_float(a), to_float(b)).flatten()
    return values


def usage(uses, draws=math.inf):
    """The share of codes that occur, of `draws` codes drawn without replacement from those that
    were used uses (K,) times: what is expected of it."""
    from scipy.stats import hypergeom

    total = uses.sum().item()
    return 1 - hypergeom.pmf(0, total, uses.numpy(), min(draws, total)).mean()


def perplexity(uses):
    """exp(entropy) of the frequencies."""
    from scipy.stats import entropy

    return math.exp(entropy(uses.numpy()))


def mean_and_spread(name, values):
    return {name: values.mean().item(), f"{name}_std": values.std(correction=0).item()}


def collect(batches):
    """The rows of all batches of all processes, on the first one."""
    rows = torch.cat(batches) if batches else torch.empty(0)
    if not torch.distributed.is_initialized():
        return rows
    is_first = torch.distributed.get_rank() == 0
    shares = [None] * torch.distributed.get_world_size() if is_first else None
    torch.distributed.gather_object(rows, shares)
    return torch.cat(shares) if is_first else None
