"""reference.py and convert.py: networks of other sizes than the fixtures', whole checkpoints, run folders, bad input.

The names of the releases' tensors are generated here. The first test compares them with those of the fixtures.
"""

import json
import math
import pickle

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, forked
from fill import fill
from safetensors.torch import load_file, save_file

import convert
import evaluate
import sample
from convert import read_config
from harness.config import UserError
from harness.models import load_run, save_run
from harness.reference import KINDS, from_reference
from harness.sampling import load_models

FIXTURES = ROOT / "tests/fixtures"


# ---------------------------------------------------------------------------------------------------------------------
# Names and shapes, as the releases have them


def layer(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def resnet(name, c_in, c_out):
    state = {**layer(f"{name}.norm1", c_in), **layer(f"{name}.conv1", c_out, c_in, 3, 3), **layer(f"{name}.norm2", c_out),
             **layer(f"{name}.conv2", c_out, c_out, 3, 3)}
    return state | (layer(f"{name}.nin_shortcut", c_out, c_in, 1, 1) if c_in != c_out else {})


def attention(name, c):
    return layer(f"{name}.norm", c) | {k: v for part in ("q", "k", "v", "proj_out") for k, v in layer(f"{name}.{part}", c, c, 1, 1).items()}


def middle(name, c, ends=("block_1", "attn_1", "block_2")):
    return resnet(f"{name}.{ends[0]}", c, c) | attention(f"{name}.{ends[1]}", c) | resnet(f"{name}.{ends[2]}", c, c)


def down(net):
    state, c, size = layer("encoder.conv_in", net["ch"], 3, 3, 3), net["ch"], net["resolution"]
    for i, mult in enumerate(net["ch_mult"]):
        for j in range(net["num_res_blocks"]):
            state |= resnet(f"encoder.down.{i}.block.{j}", c, net["ch"] * mult)
            c = net["ch"] * mult
            if size in net["attn_resolutions"]:
                state |= attention(f"encoder.down.{i}.attn.{j}", c)
        if i < len(net["ch_mult"]) - 1:
            state |= layer(f"encoder.down.{i}.downsample.conv", c, c, 3, 3)
            size //= 2
    return state


def end_of_encoder(suffix, c, z):
    return middle(f"encoder.mid{suffix}", c) | layer(f"encoder.norm_out{suffix}", c) | layer(f"encoder.conv_out{suffix}", z, c, 3, 3)


def up(net, c):
    state, size = {}, net["resolution"] // 2 ** (len(net["ch_mult"]) - 1)
    for i in reversed(range(len(net["ch_mult"]))):
        for j in range(net["num_res_blocks"] + 1):
            state |= resnet(f"decoder.up.{i}.block.{j}", c, net["ch"] * net["ch_mult"][i])
            c = net["ch"] * net["ch_mult"][i]
            if size in net["attn_resolutions"]:
                state |= attention(f"decoder.up.{i}.attn.{j}", c)
        if i > 0:
            state |= layer(f"decoder.up.{i}.upsample.conv", c, c, 3, 3)
            size *= 2
    return state | layer("decoder.norm_out", c) | layer("decoder.conv_out", 3, c, 3, 3)


def decoder(net, z):
    c = net["ch"] * net["ch_mult"][-1]
    return layer("decoder.conv_in", c, z, 3, 3) | middle("decoder.mid", c) | up(net, c)


def vqgan_taming(config):
    net, dim = config["ddconfig"], config["embed_dim"]
    z = net["z_channels"]
    return (down(net) | end_of_encoder("", net["ch"] * net["ch_mult"][-1], z) | decoder(net, z) | layer("quant_conv", dim, z, 1, 1)
            | layer("post_quant_conv", z, dim, 1, 1) | {"quantize.embedding.weight": (config["n_embed"], dim)})


def vqgan_llamagen(config):
    state, c, levels, z = layer("encoder.conv_in", config["ch"], 3, 3, 3), config["ch"], len(config["ch_mult"]), config["z_channels"]
    dim = config["codebook_embed_dim"]
    for i, mult in enumerate(config["ch_mult"]):
        for j in range(config["num_res_blocks"]):
            state |= resnet(f"encoder.conv_blocks.{i}.res.{j}", c, config["ch"] * mult)
            c = config["ch"] * mult
            state |= attention(f"encoder.conv_blocks.{i}.attn.{j}", c) if i == levels - 1 else {}
        state |= layer(f"encoder.conv_blocks.{i}.downsample.conv", c, c, 3, 3) if i < levels - 1 else {}
    state |= middle("encoder.mid", c, "012") | layer("encoder.norm_out", c) | layer("encoder.conv_out", z, c, 3, 3)
    state |= layer("decoder.conv_in", c, z, 3, 3) | middle("decoder.mid", c, "012")
    for i, mult in enumerate(reversed(config["ch_mult"])):
        for j in range(config["num_res_blocks"] + 1):
            state |= resnet(f"decoder.conv_blocks.{i}.res.{j}", c, config["ch"] * mult)
            c = config["ch"] * mult
            state |= attention(f"decoder.conv_blocks.{i}.attn.{j}", c) if i == 0 else {}
        state |= layer(f"decoder.conv_blocks.{i}.upsample.conv", c, c, 3, 3) if i < levels - 1 else {}
    return (state | layer("decoder.norm_out", c) | layer("decoder.conv_out", 3, c, 3, 3) | layer("quant_conv", dim, z, 1, 1)
            | layer("post_quant_conv", z, dim, 1, 1) | {"quantize.embedding.weight": (config["codebook_size"], dim)})


def vqvae_simplecnn(config):
    c, dim = config["hidden_dim"], config["codebook_dim"]
    state = layer("encoder.downblocks.0", c // 2, 3, 4, 4) | layer("encoder.downblocks.2", c, c // 2, 4, 4)
    state |= layer("encoder.downblocks.4", c, c, 3, 3) | layer("decoder.upblocks.1", c, c, 3, 3)
    for part in ("encoder", "decoder"):
        for i in range(config["n_resblocks"]):
            state |= {f"{part}.resblocks.{i}.blocks.1.weight": (c, c, 3, 3), f"{part}.resblocks.{i}.blocks.3.weight": (c, c, 1, 1)}
    state |= {"decoder.upblocks.3.weight": (c, c // 2, 4, 4), "decoder.upblocks.3.bias": (c // 2,),
              "decoder.upblocks.5.weight": (c // 2, 3, 4, 4), "decoder.upblocks.5.bias": (3,)}
    return (state | {"quantizer.codebook.weight": (config["codebook_num"], dim)} | layer("enc2code", dim, c, 1, 1)
            | layer("code2dec", c, dim, 1, 1))


def mqvae(config):
    net, dim, z = config["encoder"], config["quantizer"]["codebook_dim"], config["encoder"]["z_channels"]
    c = config["demasker"]["output_dim"]
    state = down(net) | end_of_encoder("", net["ch"] * net["ch_mult"][-1], z) | up(config["decoder"], c)
    state |= layer("masker.score_pred_net.1", z, z, 3, 3) | layer("masker.score_pred_net.3", 1, z, 1, 1)
    state |= layer("masker.score_pred_net.4", 1) | {f"masker.score_pred_net.4.running_{x}": (1,) for x in ("mean", "var")}
    state |= {"masker.pre_projection.weight": (dim, z), "demasker.mask_token": (1, dim, 1),
              "quantize.codebook.weight": (config["quantizer"]["codebook_size"] + 1, dim)}
    state |= layer("demasker.post_projection", c, dim, 1, 1) | layer("demasker.conv_in", c, c, 3, 3)
    for i in range(config["demasker"]["n_layer"]):
        state |= resnet(f"demasker.transformer.blocks.{i}.resblock", c, c) | attention(f"demasker.transformer.blocks.{i}.attn", c)
    return state | resnet("demasker.transformer.last_resblock", c, c)


def dqvae(config):
    net, z, dim = config["encoder"], config["encoder"]["z_channels"], config["codebook_dim"]
    names = ["coarse", "median", "fine"] if config["kind"] == "triple" else ["coarse", "fine"]
    state, G, size = down(net), len(names), config["decoder"]["latent_size"]
    for g, name in enumerate(names):
        state |= end_of_encoder(f"_{name}", net["ch"] * net["ch_mult"][-1 - g], z)
        state |= layer(f"encoder.router.feature_norm_{name}", z) if "entropy" not in config["kind"] else {}
    if "entropy" not in config["kind"]:
        state |= layer("encoder.router.gate.0", G * z, G * z) | layer("encoder.router.gate.2", G, G * z)
    state |= {f"decoder.position_bias_learned.{x}_embed.weight": (size, z) for x in ("row", "col")}
    return (state | decoder(config["decoder"], z) | layer("decoder.position_bias_fourier.lff.ffm.conv", z, 2, 1, 1)
            | layer("quant_conv", dim, z, 1, 1) | layer("post_quant_conv", z, dim, 1, 1)
            | {"quantize.codebook.weight": (config["codebook_size"] + 1, dim)})


def blocks(name, number, c):
    state = {}
    for i in range(number):
        for part in ("key", "query", "value", "proj"):
            state |= layer(f"{name}.{i}.attn.{part}", c, c)
        state |= layer(f"{name}.{i}.ln1", c) | layer(f"{name}.{i}.ln2", c)
        state |= layer(f"{name}.{i}.mlp.0", 4 * c, c) | layer(f"{name}.{i}.mlp.2", c, 4 * c)
    return state


def gpt_taming(config):
    c, vocabulary = config["n_embd"], config.get("vocab_size", config["codebook_size"] + 1)
    return (blocks("blocks", config["n_layer"], c) | layer("ln_f", c)
            | {"pos_emb": (1, config["block_size"], c), "tok_emb.weight": (vocabulary, c), "head.weight": (vocabulary, c)})


def stackformer(config):
    c, vocabulary, cells = config["n_embd"], config["codebook_size"] + (config["n_classes"] or 1), config["grid"] ** 2 + 1
    return (blocks("position_transformer", config["position_layer"], c) | blocks("value_transformer", config["value_layer"], c)
            | {"pos_emb": (1, config["block_size"], c), "value_pos_emb.weight": (cells, c), "value_emb.weight": (vocabulary, c),
               "position_head.1.weight": (cells, c), "value_head.1.weight": (vocabulary, c)}
            | layer("position_head.0", c) | layer("value_head.0", c))


def dq_transformer(config):
    c, special, starts = config["n_embd"], config["special"], config["n_classes"] or 1
    rows = {k: special[f"{k}_sos_or_first_class"] + starts for k in ("content", "coarse_position", "fine_position")}
    return (blocks("position_transformer", config["position_layer"], c) | blocks("content_transformer", config["content_layer"], c)
            | {"pos_emb": (1, config["block_size"], c), "content_coarse_pos_emb.weight": (rows["coarse_position"], c),
               "content_fine_pos_emb.weight": (rows["fine_position"], c), "content_emb.weight": (rows["content"], c),
               "seg_emb.weight": (2, c), "position_head.1.weight": (rows["fine_position"], c),
               "content_head.1.weight": (rows["content"], c)} | layer("position_head.0", c) | layer("content_head.0", c))


NAMES = {f.__name__: f for f in (vqgan_taming, vqgan_llamagen, vqvae_simplecnn, mqvae, dqvae, gpt_taming, stackformer, dq_transformer)}


def reference(kind, config):
    return {k: torch.as_tensor(fill(k, shape)) for k, shape in NAMES[kind](config).items()}


@pytest.mark.parametrize("name, kind", [
    ("vqgan_taming",) * 2, ("vqgan_llamagen",) * 2, ("vqvae_simplecnn",) * 2, ("mqvae",) * 2, ("dqvae_dual", "dqvae"),
    ("dqvae_triple", "dqvae"), ("dqvae_entropy", "dqvae"), ("gpt_taming",) * 2, ("stackformer",) * 2,
    ("stackformer_class", "stackformer"), ("dq_transformer",) * 2,
])
def test_the_pattern_makes_the_names_of_the_fixtures(name, kind):
    about = json.loads((FIXTURES / f"{name}.json").read_text())
    dropped = ("temb_proj", "num_batches_tracked", "attn.mask")
    assert NAMES[kind](about["config"]) == {k: tuple(v) for k, v in about["parameters"].items() if not any(d in k for d in dropped)}


# ---------------------------------------------------------------------------------------------------------------------
# Other sizes

NET = dict(ch=64, ch_mult=[1, 2, 1, 2], num_res_blocks=2, attn_resolutions=[12, 6], z_channels=96, resolution=48)
DQ = {"encoder": NET, "decoder": {**NET, "ch_mult": [2, 1, 1], "attn_resolutions": [], "latent_size": 12},
      "codebook_size": 50, "codebook_dim": 40, "beta": 0.5, "budget": {"target_ratio": 0.4, "gamma": 3.0}, "kind": "dual_feature"}
TOKENS = {"n_head": 3, "n_embd": 24, "embd_pdrop": 0.0, "resid_pdrop": 0.1, "attn_pdrop": 0.0}
SPECIAL = {"content_eos": 51, "content_sos_or_first_class": 52, "coarse_position_eos": 10, "coarse_position_sos_or_first_class": 11,
           "fine_position_eos": 37, "fine_position_sos_or_first_class": 38}
STACK = {**TOKENS, "grid": 5, "codebook_size": 50, "codes_per_image": 7, "block_size": 9, "position_sos": 25,
         "position_layer": 4, "value_layer": 1}
DQT = {**TOKENS, "coarse_hw": 3, "fine_hw": 6, "codebook_size": 50, "special": SPECIAL, "block_size": 41, "position_layer": 1,
       "content_layer": 3, "fine_position_order": "region-first"}
OTHERS = [
    ("vqgan_taming", {"ddconfig": NET, "n_embed": 50, "embed_dim": 24}),
    ("vqgan_taming", {"ddconfig": {**NET, "ch": 32, "ch_mult": [1, 1, 2, 2, 4], "attn_resolutions": []}, "n_embed": 9, "embed_dim": 4}),
    ("vqgan_llamagen", {"ch": 32, "ch_mult": [1, 2, 2, 4], "num_res_blocks": 1, "z_channels": 48, "codebook_size": 50,
                        "codebook_embed_dim": 4, "l2_norm": True, "beta": 0.25}),
    ("vqvae_simplecnn", {"hidden_dim": 64, "n_resblocks": 3, "codebook_num": 50, "codebook_dim": 12, "l2_norm": True}),
    ("mqvae", {"encoder": NET, "decoder": NET, "masker": {"topk_ratio": 0.4}, "demasker": {"output_dim": 128, "n_layer": 3},
               "quantizer": {"codebook_size": 50, "codebook_dim": 40, "commitment_beta": 0.5, "decay": 0.9,
                             "restart_unused_codes": False}}),
    ("dqvae", DQ),
    ("dqvae", DQ | {"kind": "dual_entropy", "router": {"threshold": 1.5, "patch_size": 8}}),
    ("dqvae", DQ | {"kind": "triple", "decoder": DQ["decoder"] | {"ch_mult": [2, 1], "latent_size": 24},
                    "budget": {"target_median_ratio": 0.3, "target_fine_ratio": 0.2, "gamma": 2.0}}),
    ("gpt_taming", {**TOKENS, "codebook_size": 50, "grid": 3, "block_size": 30, "n_layer": 3}),
    ("gpt_taming", {**TOKENS, "codebook_size": 50, "grid": 3, "block_size": 30, "n_layer": 1, "vocab_size": 50, "sos_token": 2}),
    ("gpt_taming", {**TOKENS, "codebook_size": 50, "grid": 3, "block_size": 10, "n_layer": 1, "vocab_size": 50, "n_classes": 7}),
    ("stackformer", STACK | {"n_classes": 0}),
    ("stackformer", STACK | {"n_classes": 11}),
    ("dq_transformer", DQT | {"n_classes": 0}),
    ("dq_transformer", DQT | {"n_classes": 4}),
]


@pytest.mark.parametrize("kind, config", OTHERS, ids=lambda x: x if isinstance(x, str) else "")
def test_other_sizes(kind, config):
    state = reference(kind, config)
    model = from_reference(kind, state, config)
    ours = torch.cat([v.flatten().float() for k, v in model.state_dict().items() if "ema_" not in k and "queue" not in k])
    theirs = torch.cat([v.flatten() for v in state.values()])
    unknown = {"num_batches_tracked": 1, "thresholds": len(getattr(model, "thresholds", []))}
    extra = sum(n for name, n in unknown.items() if any(name in k for k in model.state_dict()))
    ours, theirs = np.sort(ours.numpy()), np.sort(theirs.numpy())
    nearest = theirs[np.searchsorted(theirs, ours).clip(max=len(theirs) - 1)]
    assert (ours != nearest).sum() <= extra  # every weight is one of theirs
    with torch.no_grad():
        if hasattr(model, "encode"):
            images = torch.rand(2, 3, 48, 48) * 2 - 1
            torch.testing.assert_close(model.decode(model.encode(images)), model(images).images)
        else:
            labels = torch.tensor([0, config["n_classes"] - 1]) if config.get("n_classes") else None
            codes = model.sample(2, labels)
            assert model(codes, labels)["loss"].isfinite()


@pytest.mark.parametrize("kind, config", OTHERS[4:6])
def test_a_codebook_keeps_its_moving_averages(kind, config):
    """A step on two images then moves the codes little."""
    state, K = reference(kind, config), 50
    dim = state["quantize.codebook.weight"].shape[1]
    count, total = 100 + torch.arange(K).float(), 100 * torch.randn(K, dim)
    model = from_reference(kind, state | {"quantize.codebook.cluster_size_ema": count, "quantize.codebook.embed_ema": total}, config)
    quantizer = model.quantizer
    assert torch.equal(quantizer.ema_count, count) and torch.equal(quantizer.ema_sum, total)
    before = (total / count.unsqueeze(1)).clone()
    with torch.no_grad():
        quantizer.codebook.copy_(before)
        quantizer.ema_decay = 0.99
        model.train()(torch.rand(2, 3, 48, 48) * 2 - 1)
    moved = (quantizer.codebook - before).norm(dim=1) / before.norm(dim=1)
    assert moved.max() > 0 and (moved > 0.2).float().mean() < 0.1
    with pytest.raises(ValueError, match="cluster_size_ema .3,. cannot become quantizer.ema_count"):
        from_reference(kind, state | {"quantize.codebook.cluster_size_ema": torch.ones(3)}, config)


def test_a_class_of_taming_is_the_code_of_its_number():
    kind, config = OTHERS[10]
    state = reference(kind, config)
    model = from_reference(kind, state, config)
    assert torch.equal(model.start_emb.weight, state["tok_emb.weight"][:7]) and torch.equal(model.code_emb.weight, state["tok_emb.weight"])
    model = from_reference(*(OTHERS[9][0], reference(*OTHERS[9]), OTHERS[9][1]))
    assert torch.equal(model.start_emb.weight[0], model.code_emb.weight[2])


@pytest.mark.parametrize("kind, config", [OTHERS[i] for i in (0, 4, 8, 11, 13)], ids=lambda x: x if isinstance(x, str) else "")
def test_every_missing_extra_and_misshapen_key_is_named(kind, config):
    state = reference(kind, config)
    for name in list(state)[:: max(1, len(state) // 12)]:
        for change in ("missing", "extra", "misshapen"):
            changed = dict(state)
            if change == "missing":
                del changed[name]
            elif change == "extra":
                changed[f"{name}x"] = state[name]
            else:
                changed[name] = torch.cat([state[name], state[name]])
            with pytest.raises(ValueError) as error:
                from_reference(kind, changed, config)
            if change != "missing":  # a missing key is named by our name
                assert name in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Whole checkpoints


TAMING = {"model": {"base_learning_rate": 4.5e-6, "target": "taming.models.vqgan.VQModel", "params": {
    "embed_dim": 16, "n_embed": 40, "ddconfig": {"double_z": False, "in_channels": 3, "out_ch": 3, "dropout": 0.0, "ch": 32,
                                                 "z_channels": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [],
                                                 "resolution": 16},
    "lossconfig": {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": {"disc_start": 0}}}}}
NET2NET = {"model": {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": {
    "unconditional": True, "cond_stage_key": "image", "first_stage_config": TAMING["model"],
    "transformer_config": {"params": {"vocab_size": 40, "block_size": 70, "n_layer": 2, "n_head": 2, "n_embd": 16}}}}}


def write(path, state, config, **more):
    torch.save({"state_dict": state, "epoch": 3, "global_step": 7, **more}, path)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(config))
    return path


def taming_state(prefix=""):
    state = reference("vqgan_taming", TAMING["model"]["params"])
    state["loss.discriminator.main.0.weight"] = torch.zeros(4, 3, 4, 4)
    state["loss.perceptual_loss.lin0.model.1.weight"] = torch.zeros(1)
    return {prefix + k: v for k, v in state.items()}


def run(kind, path, out, *more):
    convert.main([kind, str(path), "--config", str(path.with_suffix(".yaml")), "--out", str(out), *more])


def test_a_converted_vqgan_is_a_run_like_any_other(tmp_path, train2):
    path, out = write(tmp_path / "last.ckpt", taming_state(), TAMING), tmp_path / "vqgan"
    run("vqgan_taming", path, out, "--data", "name=shapes", "train_size=20", "val_size=4")
    model, config = load_run(out)
    want = from_reference("vqgan_taming", reference("vqgan_taming", TAMING["model"]["params"]), TAMING["model"]["params"])
    assert all(torch.equal(v, want.state_dict()[k]) for k, v in model.state_dict().items())
    assert config["model"]["quantizer"]["codebook_size"] == 40 and config["data"]["image_size"] == 16
    # Its reconstructions can be evaluated
    alone = ["--without", "lpips", "inception", "--num_workers", "0"]
    evaluate.main(["--run", str(out), *alone])
    found = json.loads((out / "metrics.json").read_text())
    assert found["images"] == 4 and found["bits"] == pytest.approx(64 * math.log2(40)) and found["psnr"] > 5
    # Round trip, and stage 2 on its codes
    save_run(tmp_path / "again", config, {"model": model})
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in load_run(tmp_path / "again")[0].state_dict().items())
    (tmp_path / "gpt.yaml").write_text(f"model: {{name: gpt, n_layer: 1, n_head: 2, n_embd: 16}}\ncodes: {{stage1: {out}}}\n"
                                       "train: {train_batch_size: 4, max_train_steps: 2, learning_rate: 1.0e-3, log_with: null, "
                                       f"dataloader_num_workers: 0, output_dir: {tmp_path}/gpt}}\n")
    train2(tmp_path / "gpt.yaml")
    sample.main(["--run", str(tmp_path / "gpt"), "-n", "3"])
    assert (tmp_path / "gpt/samples/seed_0/000002.png").is_file()
    evaluate.main(["--run", str(tmp_path / "gpt"), "-n", "2", *alone])
    assert json.loads((tmp_path / "gpt/metrics.json").read_text())["bits"] > 0


def test_a_transformer_of_taming_brings_its_vqgan(tmp_path):
    params = NET2NET["model"]["params"]
    config = params["transformer_config"]["params"] | {"codebook_size": 40, "grid": 8, "sos_token": 0}
    tokens = reference("gpt_taming", config)
    state = {f"transformer.{k}": v for k, v in tokens.items()} | taming_state("first_stage_model.")
    path, out = write(tmp_path / "net.ckpt", state, NET2NET), tmp_path / "gpt"
    run("gpt_taming", path, out)
    model, stage1, about, classes = load_models(out)
    assert torch.equal(model.head.weight, tokens["head.weight"]) and classes == [] and about["model"]["grid"] == 8
    assert torch.equal(model.start_emb.weight[0], tokens["tok_emb.weight"][0])
    sample.main(["--run", str(out), "-n", "2", "--out", str(tmp_path / "x.npz")])
    # Conditioned on something else
    params = json.loads(json.dumps(NET2NET))
    params["model"]["params"] |= {"unconditional": False, "cond_stage_key": "segmentation"}
    with pytest.raises(UserError, match="conditioned on 'segmentation'"):
        run("gpt_taming", write(tmp_path / "s.ckpt", state, params), tmp_path / "s")
    # By class
    params["model"]["params"] |= {"cond_stage_key": "class_label", "cond_stage_config": {"params": {"n_classes": 5}}}
    run("gpt_taming", write(tmp_path / "c.ckpt", state, params), tmp_path / "c")
    model, *_, classes = load_models(tmp_path / "c")
    assert model.num_classes == 5 and classes == ["0", "1", "2", "3", "4"]
    sample.main(["--run", str(tmp_path / "c"), "-n", "2", "--classes", "4", "--out", str(tmp_path / "c.npz")])


def test_the_other_yaml_files():
    """read_config finds what from_reference needs."""
    net = dict(NET)
    mq = {"model": {"params": {
        "encoder_config": {"params": net}, "decoder_config": {"params": net}, "vqconfig": {"params": OTHERS[4][1]["quantizer"]},
        "masker_config": {"params": {"topk_ratio": 0.4}}, "demasker_config": {"params": {"output_dim": 128, "n_layer": 3}}}}}
    assert KINDS["mqvae"](read_config("mqvae", mq))[0] == KINDS["mqvae"](OTHERS[4][1])[0]
    quantizer = {"params": {"codebook_size": 50, "codebook_dim": 40, "commitment_beta": 0.5}}
    loss = {"params": {"budget_loss_config": {"params": {"target_ratio": 0.4, "gamma": 3.0}}}}
    router = {"target": "modules.dynamic_modules.RouterDual.DualGrainFeatureRouter", "params": {"num_channels": 96}}
    dq = {"model": {"params": {"encoderconfig": {"params": {**net, "router_config": router}}, "decoderconfig": {"params": DQ["decoder"]},
                               "vqconfig": quantizer, "lossconfig": loss}}}
    assert KINDS["dqvae"](read_config("dqvae", dq))[0] == KINDS["dqvae"](DQ)[0]
    stack = {"model": {"params": {
        "transformer_config": {"params": {**TOKENS, "vocab_size": 61, "position_size": 26, "block_size": 9, "position_layer": 4,
                                          "value_layer": 1}},
        "first_stage_config": {"params": {"vqconfig": quantizer, "masker_config": {"params": {"topk_ratio": 0.3}}}},
        "n_classes": 11, "sos_pos_token": 25, "height_and_weight": 5}}}
    assert KINDS["stackformer"](read_config("stackformer", stack))[0] == KINDS["stackformer"](OTHERS[12][1])[0]
    codes = {"coarse_hw": 3, "fine_hw": 6, "content_pad_code": 50, "content_eos_code": 51, "coarse_position_eos_code": 10,
             "fine_position_eos_code": 37, "fine_position_order": "region-first"}
    net = {**TOKENS, "block_size": 41, "position_layer": 1, "content_layer": 3}
    by_class = {"n_classes": 4, "threshold_content": 52, "threshold_coarse_position": 11, "threshold_fine_position": 38}
    without = {"coarse_sos": 52, "coarse_pos_sos": 11, "fine_sos": 52, "fine_pos_sos": 38}
    for classes, starts in ((4, {"class_cond_stage_config": {"params": by_class}}), (0, {"uncond_stage_config": {"params": without}})):
        given = {"model": {"params": {"transformer_config": {"params": net}, "permuter_config": {"params": codes}, **starts}}}
        config = read_config("dq_transformer", given)
        from_reference("dq_transformer", reference("dq_transformer", DQT | {"n_classes": classes}), config)
    simple = {"encoder": {"params": {"img_channels": 3, "hidden_dim": 64, "n_resblocks": 3}},
              "quantizer": {"params": {"codebook_num": 50, "codebook_dim": 12, "l2_norm": True}}}
    assert KINDS["vqvae_simplecnn"](read_config("vqvae_simplecnn", simple))[0] == KINDS["vqvae_simplecnn"](OTHERS[3][1])[0]


def test_thresholds_of_the_entropy_router(tmp_path, capsys):
    router = {"target": "RouterDual.DualGrainFixedEntropyRouter", "params": {"json_path": "nowhere.json", "fine_grain_ratito": 0.4}}
    given = {"model": {"params": {"encoderconfig": {"params": {**NET, "router_config": router}}, "decoderconfig": {"params": DQ["decoder"]},
                                  "vqconfig": {"params": {"codebook_size": 50, "codebook_dim": 40, "commitment_beta": 0.5}}}}}
    with pytest.raises(UserError, match="name it by --thresholds"):
        read_config("dqvae", given)
    (tmp_path / "t.json").write_text(json.dumps({"60": 1.25, "40": 0.5}))
    config = read_config("dqvae", given, tmp_path / "t.json")
    assert "60 % instead of 50 %" in capsys.readouterr().out
    model = from_reference("dqvae", reference("dqvae", DQ | {"kind": "dual_entropy"}), config)
    assert model.thresholds.tolist() == [1.25] and model.ratios == [0.4]


def test_averaged_weights_discriminator_and_other_containers(tmp_path):
    state = taming_state()
    averaged = {f"model_ema.{k.replace('.', '')}": v + 1 for k, v in state.items() if not k.startswith("loss.")}
    path = write(tmp_path / "a.ckpt", state | averaged | {"model_ema.decay": torch.ones(())}, TAMING)
    run("vqgan_taming", path, tmp_path / "plain", "--discriminator")
    run("vqgan_taming", path, tmp_path / "ema", "--ema")
    plain, ema = (load_run(tmp_path / x)[0] for x in ("plain", "ema"))
    assert torch.equal(plain.to_image.bias + 1, ema.to_image.bias)
    checkpoint = tmp_path / "plain/checkpoints/step_00000000"
    assert load_file(checkpoint / "discriminator.safetensors")["0.weight"].shape == (4, 3, 4, 4)
    assert not (tmp_path / "ema/checkpoints/step_00000000/discriminator.safetensors").exists()
    config = OTHERS[2][1]
    llamagen = reference("vqgan_llamagen", config)
    torch.save({"model": llamagen, "optimizer": {}, "steps": 5}, tmp_path / "l.pt")
    save_file(llamagen, tmp_path / "l.safetensors")
    for name in ("l.pt", "l.safetensors"):
        (tmp_path / "l.yaml").write_text(yaml.safe_dump(config))
        run("vqgan_llamagen", tmp_path / name, tmp_path / name.replace(".", "_"))
        assert torch.equal(load_run(tmp_path / name.replace(".", "_"))[0].to_image.bias, llamagen["decoder.conv_out.bias"])


class Evil:
    def __reduce__(self):
        import os
        return os.system, ("touch evil",)


def test_bad_checkpoints_are_one_sentence_and_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = write(tmp_path / "good.ckpt", taming_state(), TAMING)
    out, data = tmp_path / "out", good.read_bytes()

    def refused(kind, path, sentence, *more, config=TAMING):
        path.with_suffix(".yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(UserError, match=sentence) as error:
            run(kind, path, out, *more)
        assert not out.exists() and "\n" not in str(error.value)

    for cut in (0, 10, 1000, len(data) // 2, len(data) - 10):
        (tmp_path / "cut.ckpt").write_bytes(data[:cut])
        refused("vqgan_taming", tmp_path / "cut.ckpt", "is not a whole checkpoint")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    refused("vqgan_taming", tmp_path / "cut.safetensors", "is not a whole checkpoint|holds no named|do not fit")
    write(tmp_path / "evil.ckpt", taming_state(), TAMING, callbacks=Evil())
    refused("vqgan_taming", tmp_path / "evil.ckpt", "add --trust")
    with open(tmp_path / "old.ckpt", "wb") as file:
        pickle.dump(Evil(), file)
    refused("vqgan_taming", tmp_path / "old.ckpt", "add --trust|not a whole checkpoint")
    assert not (tmp_path / "evil").exists()
    refused("vqgan_taming", tmp_path / "nowhere.ckpt", "there is no checkpoint")
    refused("mqvae", good, "this is not the config of a mqvae")
    refused("gpt_taming", good, "this is not the config of a gpt_taming")
    wrong = json.loads(json.dumps(TAMING))
    wrong["model"]["params"]["ddconfig"]["ch"] = 64
    refused("vqgan_taming", good, "do not fit the config", config=wrong)
    wrong["model"]["target"] = "taming.models.vqgan.GumbelVQ"
    refused("vqgan_taming", good, "Gumbel", config=wrong)
    refused("vqgan_taming", good, "holds no averaged weights", "--ema")
    torch.save(reference(*OTHERS[8]), tmp_path / "gpt.pt")
    refused("vqgan_taming", tmp_path / "gpt.pt", "unknown")
    refused("gpt_taming", tmp_path / "gpt.pt", "does not hold the weights of the first stage", config=OTHERS[8][1])
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="is there already"):
        run("vqgan_taming", good, out)
    assert (out / "mine.txt").read_text() == "kept"


def test_trust_loads_what_was_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "evil.ckpt", taming_state(), TAMING, callbacks=Evil())
    run("vqgan_taming", path, tmp_path / "out", "--trust")
    assert (tmp_path / "evil").exists()  # its code did run, as --trust allows


def test_the_command(tmp_path):
    path = write(tmp_path / "last.ckpt", taming_state(), TAMING)
    words = ["convert.py", "vqgan_taming", path, "--config", path.with_suffix(".yaml"), "--out", tmp_path / "out"]
    assert "vqgan" in forked(tmp_path, *words)
    said = forked(tmp_path, *words, status=1)
    assert said.startswith("error: ") and said.count("\n") == 1
