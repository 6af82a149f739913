"""Reading and validating params.yaml."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from babelscope.config.checks import Config
from babelscope.config.schema import Dataset
from babelscope.config.values import expanded, explain
from babelscope.core.errors import UserError


class YamlLoader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.2 as DVC reads it: `no`, `on` and `12:30` are strings, `1e-3` is a number, `010` is ten, `0o10` eight.

    Duplicate keys, merge keys (`<<`) and dates are refused: no file here needs them.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys all differ."""
        content: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            try:
                is_known = key in content
            except TypeError:
                raise _refusal("a list or a mapping cannot be a key", key_node) from None
            if is_known:
                raise _refusal(f"duplicate key {key!r:.80}", key_node)
            content[key] = self.construct_object(value_node, deep=deep)
        return content

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """An integer (decimal, `0x`, `0o`, `0b`) or a float; underscores are ignored."""
        text = self.construct_scalar(node).replace("_", "").lower()
        try:
            if node.tag == "tag:yaml.org,2002:float":
                return float(re.sub(r"\.(?=inf$|nan$)", "", text))
            return int(text, {"0x": 16, "0o": 8, "0b": 2}.get(text.lstrip("+-")[:2], 10))
        except ValueError as error:
            raise _refusal(str(error)[:80], node) from None

    def refuse(self, node: yaml.ScalarNode) -> Any:
        """Raise for a kind of scalar that no file here needs."""
        raise _refusal(f"{node.value!r} is not supported here; write it between quotes if it is a string", node)


def _refusal(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


# The tag, the scalars that have it, and their first characters. The patterns are those of DVC's reader, ruamel.yaml.
_RESOLVERS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "float": (
        r"[-+]?[0-9][0-9_]*(\.[0-9_]*([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|[-+]?\.[0-9_]+([eE][-+][0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "int": (r"[-+]?(0b[01_]+|0o?[0-7_]+|[0-9_]+|0x[0-9a-fA-F_]+)", "-+0123456789"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
    "value": (r"=", "="),
    "timestamp": (
        r"\d{4}-\d\d-\d\d|\d{4}-\d\d?-\d\d?([Tt]|[ \t]+)\d\d?:\d\d:\d\d(\.\d*)?([ \t]*(Z|[-+]\d\d?(:\d\d)?))?",
        "0123456789",
    ),
}
for _tag, (_pattern, _first) in _RESOLVERS.items():
    YamlLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$", re.ASCII), list(_first)
    )
    if _tag in ("int", "float"):
        YamlLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", YamlLoader.construct_number)
    elif _tag in ("merge", "value", "timestamp"):
        YamlLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", YamlLoader.refuse)


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
    UserError: the file is missing, is not YAML or has a value that is not allowed; or a folder that it names is missing
        in the temporary copy of the repository in which DVC runs (`dvc exp run --temp`, the queue).
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
    entries = {f"corpus.datasets.{number}.path": entry.path for number, entry in enumerate(params.corpus.datasets)}
    return (
        entries
        | {
            "model.name": params.model.name if params.model.source == "huggingface" else None,
            "corpus.path": params.corpus.path,
            "pretrained.name": params.pretrained.name,
        }
        | {key: one.path if isinstance(one, Dataset) else one for key, one in _texts(params).items()}
    )


def _texts(params: Config) -> dict[str, str | Dataset | None]:
    """Texts besides those of the corpus, by key."""
    return {"identify.also": params.identify.also, "steer.prompts_from": params.steer.prompts_from}


def check_folders(params: Config) -> None:
    """Refuse missing local folders that only late stages read, before the long stages run.

    Raises
    ------
    UserError: names the key and the folder.
    """
    texts = _texts(params)
    folders = {key: one for key, one in texts.items() if isinstance(one, str)}
    # These may also be names on the Hugging Face hub.
    names = {f"{key}.path": one.path for key, one in texts.items() if isinstance(one, Dataset)}
    if params.train.source == "pretrained":
        names["pretrained.name"] = params.pretrained.name
    folders |= {key: name for key, name in names.items() if name and name.startswith((".", "/", "~"))}
    for key, name in folders.items():
        if not expanded(name).is_dir():
            raise UserError(f"params.yaml: {key}: no folder {name!r}")


def read_yaml(path: Path) -> Any:
    """The content of a YAML 1.2 file, read as DVC reads it (see `YamlLoader`).

    Raises
    ------
    UserError: the file is missing or is not YAML.
    """
    try:
        loader = YamlLoader(path.read_text(encoding="utf-8"))
        content = loader.get_single_data()
        if loader.yaml_version not in (None, (1, 2)):
            raise ValueError("only YAML 1.2 is read; remove the %YAML line")
        return content
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the root of the repository") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(str(error).split()))
        raise UserError(f"{path}: not valid YAML: {reason}") from None


def load_at_hookpoint(arguments: Sequence[str] | None = None, path: Path = Path("params.yaml")) -> tuple[Config, str]:
    """`load`, and the hookpoint that the stage's command line names.

    Raises
    ------
    UserError: as `load`; or there is no hookpoint, or params.yaml does not list it.
    """
    params = load(path)
    return params, _last(arguments, "HOOKPOINT", "hookpoints", params.hookpoints)


def load_at_seed(arguments: Sequence[str] | None = None, path: Path = Path("params.yaml")) -> tuple[Config, str, int]:
    """`load_at_hookpoint`, and the one of `stability.seeds` that the stage's command line names after the hookpoint.

    Raises
    ------
    UserError: as `load_at_hookpoint`; or there is no seed, or params.yaml does not list it.
    """
    params, hookpoint = load_at_hookpoint((sys.argv if arguments is None else arguments)[:2], path)
    seeds = [str(seed) for seed in params.stability.seeds]
    return params, hookpoint, int(_last(arguments, "HOOKPOINT SEED", "stability.seeds", seeds))


def load_at_dictionary(arguments: Sequence[str] | None = None, path: Path = Path("params.yaml")) -> tuple[Config, str]:
    """`load`, and the one of `baselines.dictionaries` that the stage's command line names.

    Raises
    ------
    UserError: as `load`; or there is no name, or params.yaml does not list it.
    """
    params = load(path)
    return params, _last(arguments, "NAME", "baselines.dictionaries", params.baselines.dictionaries)


def _last(arguments: Sequence[str] | None, usage: str, key: str, allowed: Sequence[str]) -> str:
    """The last argument of a command line that has as many as `usage` has words; `allowed` are the values of `key`."""
    script, *rest = sys.argv if arguments is None else arguments
    if len(rest) != len(usage.split()) or rest[-1] not in allowed:
        names = ", ".join(allowed) or "none"
        raise UserError(f"usage: python {script} {usage}, one of params.yaml's {key}: {names}")
    return rest[-1]
