"""`babelscope push OWNER/NAME [HOOKPOINT ...]`: the SAEs of data/sae on the Hugging Face hub, with a model card.

They are in SAELens' layout: `SAE.from_pretrained("OWNER/NAME", "HOOKPOINT")` of sae_lens loads them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from babelscope import config, sae
from babelscope.config import Config
from babelscope.core.errors import UserError, nearest
from babelscope.core.files import copy_file, write_atomically
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
    files = {f"{name}/{file}": paths.saes / name / file for name in chosen for file in _FILES}
    files["features.parquet"] = paths.features
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such file; an earlier stage writes it: dvc repro")
    if folder is not None:
        for name, path in files.items():
            copy_file(path, folder / name)
        write_atomically(folder / "README.md", lambda path: path.write_text(text, encoding="utf-8"))
        sys.stdout.write(f"{folder}\n")
        return
    sys.stdout.write(upload(repo, files, text, private) + "\n")


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


def upload(repo: str, files: dict[str, Path], text: str, private: bool) -> str:
    """Create the repository if it is missing, and add the files and the card in one commit; returns the address."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    operations = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
    operations.append(CommitOperationAdd("README.md", text.encode()))
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
