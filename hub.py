"""Runs on the Hugging Face Hub; to put one there, push_to_hub.py.

    run_folder      "hf:user/name" to a run folder, downloaded if it is not here
    upload          a folder to a repository

Any error of the network or the Hub is one sentence (UserError).
"""

from __future__ import annotations

import re
from pathlib import Path

from config import UserError

FILES = ["*.safetensors", "*.yaml", "*.json", "*.png", "README.md"]  # that push_to_hub.py writes


def run_folder(name: str | Path) -> str | Path:
    """The folder of a run. "hf:user/name" is downloaded from the Hugging Face Hub to runs/user/name, unless it is there."""
    if not str(name).startswith("hf:"):
        return name
    repository = _repository(str(name))
    folder = f"runs/{repository}"
    if not Path(folder, "config.yaml").is_file():
        from huggingface_hub import snapshot_download  # takes a second

        try:
            snapshot_download(repository, local_dir=folder, allow_patterns=FILES, ignore_patterns=["config.yaml"])
            snapshot_download(repository, local_dir=folder, allow_patterns=["config.yaml"])  # last: with it, the folder is a run
        except Exception as error:  # of the network, of httpx, of the Hub: they have no common base
            raise UserError(f"{name} could not be downloaded from the Hugging Face Hub ({_first_line(error)}); check the name, user/name, "
                            "and the network") from error
    return folder


def upload(folder: str | Path, to: str, private: bool) -> str:
    """Puts the files of a folder into the repository `to`, "user/name", which is made if it does not exist; returns its address."""
    from huggingface_hub import HfApi

    to = _repository(to)
    try:
        address = HfApi().create_repo(to, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=to, folder_path=folder, commit_message="minVQ run")
    except Exception as error:
        raise UserError(f"{to} could not be written on the Hugging Face Hub ({_first_line(error)}); `hf auth login` first, and check the "
                        "name") from error
    return str(address)


def _repository(name: str) -> str:
    if not re.fullmatch(r"(hf:)?[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(f"a run on the Hugging Face Hub is hf:user/name; this is {name}")
    return name.removeprefix("hf:")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
