"""Types of values in params.yaml (numbers with bounds, names, paths), and messages for what pydantic refuses.

The upper bounds are far beyond any sensible value: they reject typing errors before memory is allocated.
"""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, PlainValidator

from babelscope.core.errors import nearest
from babelscope.core.redact import redact

_HOOKPOINT = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*")
_LONGEST = 200  # characters of a name that is part of a file name


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{text!r:.80} holds a character that cannot be printed")
    return text


def _inside(path: str) -> str:
    if PurePosixPath(path).is_absolute() or ".." in path.split("/"):
        raise ValueError(f"{path!r} leads out of its folder; allowed: a path below it, without '..'")
    return path


def _without_credentials(url: str) -> str:
    # params.yaml is committed and sent to MLflow. The message does not repeat the URL: it goes to a log.
    if redact(url) != url or not re.fullmatch(r"https?://[^/]+(/.*)?", url):
        raise ValueError("expected a URL such as http://localhost:8000/v1, without user, password or key in it")
    return url


def _different(names: list[str], form: re.Pattern[str], kind: str) -> list[str]:
    for name in names:
        if not form.fullmatch(name) or len(name) > _LONGEST:
            raise ValueError(f"{name!r:.80} is not {kind}")
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is listed twice")
    return names


def _devices(value: Any) -> Any:
    numbers = value if isinstance(value, list) else [value]
    is_count = type(value) is int and 0 < value <= 1024
    is_list = isinstance(value, list) and all(type(number) is int and 0 <= number < 1024 for number in numbers)
    if value != "auto" and not is_count and not (is_list and len(numbers) == len(set(numbers)) > 0):
        raise ValueError(f"{value!r:.80}; allowed: 'auto', a number of devices, or a list of their numbers")
    return value


# Positive: a count. Size: a count of things that are in memory at once.
Positive = Annotated[int, Field(gt=0, lt=2**48)]
Size = Annotated[int, Field(gt=0, le=2**26)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Factor = Annotated[float, Field(gt=0.0, le=1e6)]
Amount = Annotated[float, Field(ge=0.0, le=1e6)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Devices = Annotated[int | str | list[int], PlainValidator(_devices)]
Name = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_printable)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A path below a folder that another key names.
Inside = Annotated[Name, AfterValidator(_inside)]
Url = Annotated[Name, AfterValidator(_without_credentials)]
Hookpoints = Annotated[
    list[str], AfterValidator(lambda names: _different(names, _HOOKPOINT, "a path of names that dots separate"))
]
Languages = Annotated[
    list[str],
    AfterValidator(lambda names: _different(names, _LANGUAGE, "a language code (BCP-47, such as tr or pt-BR)")),
]


def _allowed(model: Any, path: tuple[int | str, ...]) -> list[str]:
    """The keys that the section of `model` at `path` may hold."""
    for key in path:
        field = model.model_fields.get(key) if isinstance(key, str) else None
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)


def expanded(name: str | Path) -> Path:
    """The path that a value of params.yaml names; a `~` without a known home folder is left as it is."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def local_name(name: str) -> str:
    """The name of a model or folder in outputs: a hub id as it is, or the last part of a local path.

    The rest of the path differs between machines.
    """
    folder = expanded(name)
    return folder.resolve().name if name.startswith((".", "/", "~")) or folder.is_dir() else name


def model_title(model: Mapping[str, Any]) -> str:
    """What people call a model, from `model` of params.yaml: a GGUF file without its quantisation, else its name."""
    if file := model.get("gguf_file"):
        return re.sub(r"[-._]i?q\d\w*$", "", Path(file).stem, flags=re.IGNORECASE)
    return local_name(name) if (name := model.get("name")) else ""


def explain(model: type[BaseModel], error: Any) -> str:
    """One of the errors of a `pydantic.ValidationError` of `model`: the key, what is wrong, and what is allowed."""
    path, kind = tuple(error["loc"]), error["type"]
    key = ".".join(f"{part if part.isprintable() else ascii(part):.{_LONGEST}}" for part in map(str, path))
    if kind == "extra_forbidden":
        return f"{key}: unknown key; {nearest(str(path[-1]), _allowed(model, path[:-1]))}"
    if kind == "missing":
        return f"{key}: the key is missing"
    if kind == "value_error":
        message = str(error["ctx"]["error"])
        # The checks of a whole section name their key themselves.
        return message if re.match(r"[a-z_]+\.[a-z_]+: ", message) else f"{key}: {message}"
    got = error.get("input")
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {got!r:.80}"
