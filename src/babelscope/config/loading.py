"""Reading and validating params.yaml."""

import os
from pathlib import Path
from typing import Any

import pydantic
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from babelscope.config.checks import Config
from babelscope.config.schema import Dataset
from babelscope.config.values import expanded, explain
from babelscope.core.errors import UserError


def parse(content: Any, source: str = "params.yaml") -> Config:
    """Validate the content of a params file.

    Raises
    ------
    UserError: one message that names `source`, every wrong key and what it may hold.
    """
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected sections such as 'train:', got {type(content).__name__}")
    try:
        return Config.model_validate(content)
    except pydantic.ValidationError as error:
        lines = [f"{source}: {explain(Config, e)}" for e in error.errors(include_url=False)]
        raise UserError("\n       ".join(lines)) from None


def load(path: Path = Path("params.yaml")) -> Config:
    """Read and validate params.yaml (YAML 1.2: the language code `no` is a string, `1e-3` a number).

    Raises
    ------
    UserError: the file is missing, is not YAML, or holds something that is not allowed; or it is that of a temporary
        copy of the repository (`dvc exp run --temp`, the queue) in which a folder that it names is missing.
    """
    params = parse(read_yaml(path), str(path))
    here, main = path.absolute().parent, os.environ.get("DVC_ROOT")
    for key, name in _folders(params).items():
        if main is not None and name is not None and not (here / name).exists() and (Path(main) / name).exists():
            raise UserError(
                f"{path}: {key}: {name!r} is missing in the temporary copy of the repository in which DVC runs this "
                f"experiment: DVC copies only what git or DVC tracks. Write the absolute path, {Path(main) / name}; or "
                f"track it (git add or dvc add {name}); or leave out --temp and --queue"
            )
    return params


def _folders(params: Config) -> dict[str, str | None]:
    """The values that may be paths of folders, by key."""
    also = params.identify.also
    entries = {f"corpus.datasets.{number}.path": entry.path for number, entry in enumerate(params.corpus.datasets)}
    return entries | {
        "model.name": params.model.name if params.model.source == "huggingface" else None,
        "corpus.path": params.corpus.path,
        "pretrained.name": params.pretrained.name,
        "identify.also": also.path if isinstance(also, Dataset) else also,
    }


def check_folders(params: Config) -> None:
    """Refuse local folders that do not exist and that are read only by stages behind the long ones.

    Raises
    ------
    UserError: names the key and the folder.
    """
    also = params.identify.also
    folders = {"identify.also": also} if isinstance(also, str) else {}
    # These may also be names on the Hugging Face hub.
    names = {"identify.also.path": also.path} if isinstance(also, Dataset) else {}
    if params.train.source == "pretrained":
        names["pretrained.name"] = params.pretrained.name
    folders |= {key: name for key, name in names.items() if name and name.startswith((".", "/", "~"))}
    for key, name in folders.items():
        if not expanded(name).is_dir():
            raise UserError(f"params.yaml: {key}: no folder {name!r}")


def read_yaml(path: Path) -> Any:
    """The content of a YAML 1.2 file.

    Raises
    ------
    UserError: the file is missing or is not YAML.
    """
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the root of the repository") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (YAMLError, ValueError, TypeError, RecursionError) as error:  # a mapping for a key is a TypeError
        reason = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(str(error).split()))
        raise UserError(f"{path}: not valid YAML: {reason}") from None


def hookpoint_argument(arguments: list[str], params: Config) -> str:
    """The hookpoint that a stage's command line names.

    Raises
    ------
    UserError: there is none, or params.yaml does not list it.
    """
    allowed = ", ".join(params.hookpoints)
    if len(arguments) != 2 or arguments[1] not in params.hookpoints:
        raise UserError(f"usage: python {arguments[0]} HOOKPOINT, one of params.yaml's hookpoints: {allowed}")
    return arguments[1]
