"""`babelscope params apply NAME`: put the values of an overlay, such as experiments/NAME.yaml, into params.yaml.

An overlay holds the keys that differ, in the sections of params.yaml; a value replaces the whole value in params.yaml.
Only the lines of these values change. ruamel.yaml, by which DVC writes params.yaml, deletes comments below lists, and
Babelscope does not depend on it. So the lines are found by the positions that PyYAML gives, and the result is parsed
and compared with the merged values before it is written.
"""

from pathlib import Path
from typing import Any

import yaml

from babelscope.config.loading import YamlLoader, parse, read_yaml
from babelscope.core.errors import UserError, nearest
from babelscope.core.files import write_atomically
from babelscope.core.git import git

EXPERIMENTS = Path("experiments")


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes as DVC does: strings that YAML 1.2 would read as something else in quotes, null as nothing."""

    yaml_implicit_resolvers = YamlLoader.yaml_implicit_resolvers


_Dumper.add_representer(type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", ""))


def experiments(folder: Path = EXPERIMENTS) -> dict[str, Path]:
    """The overlays in a folder by name."""
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def merge(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """The content of params.yaml with the values of an overlay: sections by key, everything else as a whole."""
    merged = dict(base)
    for key, value in overlay.items():
        in_section = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = base[key] | value if in_section else value
    return merged


def apply(name: str, path: Path = Path("params.yaml"), folder: Path = EXPERIMENTS) -> bool:
    """Merge an experiment into `path`; returns False if `path` holds it already, and nothing is written.

    Raises
    ------
    UserError: there is no such experiment, it has a key or a value that is not allowed, `path` holds another experiment
        (they do not mix), or `path` has changes that git does not have.
    """
    known = experiments(folder)
    if name not in known:
        raise UserError(f"NAME={name}: no such experiment; {nearest(name, known)}")
    overlays = {key: read_yaml(file) for key, file in known.items()}
    base, text = read_yaml(path), path.read_text(encoding="utf-8").rstrip("\n") + "\n"
    for key in ("params.yaml", name):
        content = base if key == "params.yaml" else overlays[name]
        if not isinstance(content, dict):
            raise UserError(f"{known.get(key, path)}: expected sections such as 'train:', got {type(content).__name__}")
    merged = merge(base, overlays[name])
    if merged == base:
        return False
    for other, overlay in overlays.items():
        if other != name and merge(base, overlay) == base:
            raise UserError(
                f"{path}: holds the experiment {other!r}, and experiments do not mix; put the params.yaml that you "
                f"started from back first, such as: git checkout <commit> -- {path}"
            )
    parse(merged, f"{known[name]} in {path}")
    _check_committed(path)
    new = rewritten(text, overlays[name], path)
    if YamlLoader(new).get_single_data() != merged:
        raise UserError(f"{path}: {name!r} cannot be merged line by line; write the file in block style, as DVC does")
    write_atomically(path, lambda temporary: temporary.write_text(new, encoding="utf-8"))
    return True


def _check_committed(path: Path) -> None:
    """Refuse to overwrite what git could not give back."""
    changes = git(path.absolute().parent, "status", "--porcelain", "--", path.name)
    if changes is None:
        raise UserError(
            f"{path}: its changes would be lost, because this is no git repository; git init and commit first"
        )
    if changes:
        raise UserError(f"{path}: its changes are not committed and would be lost; commit them, or git checkout {path}")


def rewritten(text: str, overlay: dict[str, Any], path: Path) -> str:
    """The text of a params file in block style with other values; all other lines and their comments stay.

    Raises
    ------
    UserError: the file does not have a key of the overlay.
    """
    changes: list[tuple[int, int, str]] = []
    root = yaml.compose(text, YamlLoader)
    for key, value in overlay.items():
        key_node, node = _entry(root, key, key, path)
        if isinstance(value, dict) and isinstance(node, yaml.MappingNode):
            for inner, wanted in value.items():
                changes.append(_change(text, *_entry(node, inner, f"{key}.{inner}", path), wanted))
        else:
            changes.append(_change(text, key_node, node, value))
    for first, last, new in sorted(changes, reverse=True):
        text = text[:first] + new + text[last:]
    return text


def _entry(node: yaml.MappingNode, key: str, full: str, path: Path) -> tuple[yaml.Node, yaml.Node]:
    for key_node, value_node in node.value:
        if key_node.value == key:
            return key_node, value_node
    known = [key_node.value for key_node, _ in node.value]
    raise UserError(f"{path}: has no key {full}; {nearest(key, known)}")


def _change(text: str, key: yaml.Node, node: yaml.Node, value: Any) -> tuple[int, int, str]:
    """The part of `text` after a key that holds its value, and what replaces it."""
    first, last = key.end_mark.index + 1, _end(node)
    line_end = text.find("\n", first)
    comment = text[last if last <= line_end else first : line_end]  # it stays on the key's line
    style = {"default_flow_style": False, "sort_keys": False, "allow_unicode": True, "width": float("inf")}
    dumped = yaml.dump({"key": value}, Dumper=_Dumper, **style)
    head, *lines = dumped.partition(":")[2].rstrip().split("\n")
    indent = " " * key.start_mark.column
    new = (head + comment).rstrip() + "".join(f"\n{indent}{line}" for line in lines)
    return first, max(last, line_end), new


def _end(node: yaml.Node) -> int:
    """Where a value ends; PyYAML's mark of a block is where the next key begins, after comments."""
    children = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) and not node.flow_style else []
    if not children:
        return int(node.end_mark.index)
    last = children[-1]
    return _end(last[1] if isinstance(last, tuple) else last)
