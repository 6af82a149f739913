"""`babelscope push OWNER/NAME [HOOKPOINT ...]`: the SAEs of data/sae on the Hugging Face hub, with a model card.

They are in SAELens' layout: `SAE.from_pretrained("OWNER/NAME", "HOOKPOINT")` of sae_lens loads them.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from babelscope import config, sae
from babelscope.config import Config
from babelscope.core.errors import UserError, nearest
from babelscope.core.files import copy_file, read_table, write_atomically
from babelscope.core.paths import Paths
from babelscope.release import card
from babelscope.sae import formats

# What a hookpoint's folder has on the hub; `history.csv` and the like stay.
_FILES = ("cfg.json", formats.SAELENS.weights)


def main(repo: str, hookpoints: Sequence[str], private: bool, licence: str | None, folder: Path | None) -> None:
    """Upload the SAEs in one commit and print their address; with `folder`, only write there what would be uploaded.

    Raises
    ------
    UserError: there is no such SAE, the SAEs are released ones of somebody else, or the hub refuses.
    """
    params, paths = config.load(), Paths(Path())
    if params.train.source == "pretrained":
        raise UserError(
            f"params.yaml: train.source: the SAEs are a copy of {params.pretrained.name}; allowed: SAEs trained here"
        )
    chosen = check(hookpoints, params, paths)
    text = card.build(repo, chosen, licence, params, paths)
    if folder is not None:
        write(folder, chosen, text, paths)
        sys.stdout.write(f"{folder}\n")
        return
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary), chosen, text, paths)
        sys.stdout.write(upload(repo, Path(temporary), private) + "\n")


def write(folder: Path, hookpoints: Sequence[str], text: str, paths: Paths) -> None:
    """Write everything that is uploaded: SAEs, the language-specific latents, and the card `text`."""
    for name in hookpoints:
        for file in _FILES:
            copy_file(paths.saes / name / file, folder / name / file)
    features = read_table(paths.features).filter(pl.col("hookpoint").is_in(list(hookpoints)), kind="sae")
    write_atomically(folder / "features.csv", features.write_csv)
    write_atomically(folder / "README.md", lambda path: path.write_text(text, encoding="utf-8"))


def check(hookpoints: Sequence[str], params: Config, paths: Paths) -> list[str]:
    """The hookpoints to upload, all by default, after their SAEs have been read."""
    have = [name for name in params.hookpoints if (paths.saes / name).is_dir()]
    if not have:
        raise UserError(f"{paths.saes}: no SAEs; `dvc repro` trains them")
    for name in hookpoints:
        if name not in have:
            raise UserError(f"{name}: no such SAE in {paths.saes}; {nearest(name, have)}")
    chosen = list(hookpoints) or have
    for name in chosen:
        sae.load(paths.saes, name)
    return chosen


def upload(repo: str, folder: Path, private: bool) -> str:
    """Create the repository if it is missing, and add the files of `folder` in one commit; returns the address."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files]
    api = HfApi(library_name="babelscope")
    try:
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        api.create_commit(address.repo_id, operations, commit_message="Upload SAEs by babelscope push")
    except HFValidationError as error:
        raise UserError(f"{repo}: {' '.join(str(error).split())}; allowed: OWNER/NAME") from None
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it") from None
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{repo}: the hub refuses ({reason:.200}); `hf auth login` with a token that may write"
        ) from None
    return str(address)
