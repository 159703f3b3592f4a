"""Puts a run on the Hugging Face Hub. Every script takes "hf:user/name" in the place of a run folder.

    python push_to_hub.py --run runs/dq_transformer --to user/name [--private]          # after `hf auth login`
    python sample.py --run hf:user/name -n 16                                   # anywhere else
    model, config = load_run("hf:user/name")                                    # from experiment

The repository holds model.safetensors and config.yaml (without the paths of this machine), for stage 2 also stage1/ and classes.json, the
results of evaluate.py, the newest picture, and a model card that shows them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import openmp  # noqa: F401, before torch
import yaml
from safetensors.torch import save_file

from evaluate import table
from experiment import STAGE2, load_run
from hub import run_folder, upload
from launch import run_main

PATHS = {"data": ["root"], "codes": ["stage1", "cache_dir"], "train": ["output_dir", "init_from", "calibration_file"]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=run_folder, help="the run folder")
    parser.add_argument("--to", required=True, metavar="USER/NAME", help="the repository; it is made if it does not exist")
    parser.add_argument("--which", choices=("latest", "best"), default="latest", help="which of the run's weights")
    parser.add_argument("--private", action="store_true", help="if the repository is made: only you can see it")
    args = parser.parse_args(argv)
    print(push_to_hub(args.run, args.to, args.which, args.private))


def push_to_hub(run: str | Path, to: str, which: Literal["latest", "best"] = "latest", private: bool = False) -> str:
    """Uploads a run's weights, config, results, picture and model card to the repository `to`, "user/name"; returns its address."""
    with tempfile.TemporaryDirectory() as folder:
        export(Path(run), Path(folder), which)
        (Path(folder) / "README.md").write_text(model_card(Path(run), Path(folder), to))
        return upload(folder, to, private)


def export(run: Path, folder: Path, which: Literal["latest", "best"] = "latest") -> None:
    """Writes the run as a folder of few files, which load_run reads like a run folder."""
    model, config = load_run(run, which)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    for section, keys in PATHS.items():
        config[section] = {k: None if k in keys else v for k, v in config[section].items()} if section in config else None
    (folder / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}, sort_keys=False))
    if (run / "stage1").is_dir():
        export(run / "stage1", folder / "stage1")
    if (run / "classes.json").is_file():
        shutil.copy(run / "classes.json", folder)
    if (run / "metrics.json").is_file():
        found = json.loads((run / "metrics.json").read_text())
        for part in (found, *found.get("rates", {}).values()):
            for key in ("run", "data", "missing"):  # paths of this machine
                part.pop(key, None)
        if found.get("which") == which:
            (folder / "metrics.json").write_text(json.dumps(found, indent=1) + "\n")
    if pictures := sorted((run / "samples").glob("*_????????.png")):
        shutil.copy(pictures[-1], folder / "picture.png")


def model_card(run: Path, folder: Path, name: str) -> str:
    """README.md of the repository: what it is, how to use it, its results and its picture."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    kind, size, stage2 = config["model"]["name"], config["data"]["image_size"], config["model"]["name"] in STAGE2
    use = f"python sample.py --run hf:{name} -n 16" if stage2 else f"python evaluate.py --run hf:{name}"
    use += "" if stage2 or config["data"]["name"] == "shapes" else " data.name=folder data.root=YOUR_IMAGES"
    task = "unconditional-image-generation" if stage2 else "image-to-image"
    text = (f"---\nlibrary_name: minvq\ntags: [{kind}, vector-quantization]\npipeline_tag: {task}\n---\n\n"
            f"# {name.rpartition('/')[2]}\n\nA {kind} for images of {size} pixels, trained with minVQ on `{config['data']['name']}`.\n\n"
            f"```bash\n{use}\n```\n")
    found = json.loads((folder / "metrics.json").read_text()) if (folder / "metrics.json").is_file() else {}
    if "dataset" in str(found):  # of older versions, it does not say which images
        results = {f"{kind} at {rate}": m for rate, m in found["rates"].items()} if "rates" in found else {kind: found}
        text += f"\n{table(results, dict.fromkeys(results, kind), markdown=True)}\n"
    elif (run / "metrics.jsonl").is_file():  # not measured: what training logged
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found = {k: v for line in logged for k, v in line.items() if k == "step" or k.startswith("val_")}
        text += "\nIn training, on validation images: " + ", ".join(f"{k} {v:.5g}" for k, v in found.items()) + "\n"
    if (folder / "picture.png").is_file():
        rows = "originals, reconstructions, samples" if stage2 else "originals, reconstructions"
        text += f"\n![From the top: {rows}](picture.png)\n"
    return text


if __name__ == "__main__":
    run_main(main)
