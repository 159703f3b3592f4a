"""Runs on the Hugging Face Hub; docs/hub.md says how to put one there.

    run_folder      "hf:user/name" to a run folder, downloaded if it is not here

Any error of the network or the Hub is one sentence (UserError).
"""

from pathlib import Path

from harness.config import UserError

# What of a run folder is not downloaded with the rest: caches and logs never, config.yaml later.
LEFT_OUT = ["codes/*", "tensorboard/*", "config.yaml"]


def run_folder(name):
    """The folder of a run. "hf:user/name" is downloaded to runs/user/name, unless it is there."""
    if not str(name).startswith("hf:"):
        return name
    repository = str(name).removeprefix("hf:")
    folder = f"runs/{repository}"
    if not Path(folder, "config.yaml").is_file():
        from huggingface_hub import hf_hub_download, snapshot_download  # takes a second

        try:
            snapshot_download(repository, local_dir=folder, ignore_patterns=LEFT_OUT)
            # The last, because with it the folder is a run.
            hf_hub_download(repository, "config.yaml", local_dir=folder)
        except Exception as error:  # of the network, of httpx, of the Hub: they have no common base
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise UserError(f"{name} could not be downloaded from the Hugging Face Hub ({why}); "
                            "check the name, hf:user/name, and the network") from error
    return folder
