"""Hundreds of mutilated params files: each is refused by one message that names file and key, or runs."""

import copy
import io
import math
import re
from pathlib import Path

import pytest
from closure import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from params_texts import TEXTS as PARAMS_TEXTS
from ruamel.yaml import YAML

from babelscope import config
from babelscope.core.errors import UserError
from babelscope.core.fingerprint import fingerprint
from babelscope.core.resume import scratch
from babelscope.models.hookpoints import layer_of
from babelscope.sae.training.schedule import learning_rate
from babelscope.tracking.store import flatten

PARAMS = ROOT / "params.yaml"
LOADED = {name: YAML(typ="safe", pure=True).load(text) for name, text in PARAMS_TEXTS.items()}
BARE = re.sub(r"(?m)^\s*#.*\n", "", PARAMS.read_text())
SAME = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

NUMBERS = [0, -1, 1, 10**9, 10**30, -(10**30), 2**63, 1e300, -1e300, 1e-300, 0.5, math.nan, math.inf, -math.inf]
TEXTS = [
    "", " ", "no", "yes", "off", "null", "~", "1e-3", "0o17", "2026-01-01", "en", "layers.6.mlp", "x" * 5000, "\0",
    "a\nb", "\x1b[31m", "\u202eevil", "😀", "é", "\u2028", "../../x", "/etc/passwd", "layers/../../x", "a/b", ".", "..",
    "%s", "{layer}", "${seed}", "<script>", "'; rm -rf", "-rf", "layers..mlp", "layers.6.mlp ", "file:///x",
]  # fmt: skip
SCALARS = st.sampled_from([None, True, False, *NUMBERS, *TEXTS]) | st.integers() | st.floats() | st.text(max_size=30)
VALUES = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), x, max_size=3), max_leaves=4
)


def places(content, path=()):
    """The paths of all keys and list items."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        yield (*path, key)
        yield from places(value, (*path, key))


def change(content, path, how, value):
    """Mutate in place; returns the dotted key that a message has to name (of a list the list's)."""
    *parents, last = path
    place = content
    for key in parents:
        place = place[key]
    match how:
        case "set":
            place[last] = value
        case "delete":
            del place[last]
        case "wrap":
            place[last] = [place[last]]
        case "nest":
            place[last] = {"value": place[last]}
        case "twice" if isinstance(place, list):
            place.append(copy.deepcopy(place[last]))
        case "empty" if isinstance(place[last], list | dict):
            place[last] = type(place[last])()
        case "rename" if isinstance(place, dict):
            place[f"{last}s"] = place.pop(last)
        case "add" if isinstance(place, dict):
            place[str(value)] = value
            path = parents  # the message names the new key
    return ".".join(str(key) for key in path if not isinstance(key, int))


def use(params):
    """What stages derive from their params before any long work."""
    assert config.parse(params.model_dump()) == params
    assert len(scratch(fingerprint("x", params.model_dump(), {})).name) == 32
    assert all(isinstance(value, str) and value.isprintable() for value in flatten(params.model_dump()).values())
    steps = -(-params.train.tokens // params.train.batch)
    rate = params.train.learning_rate or learning_rate(params.train.latents, steps)
    assert 0 < steps < 2**63 and 0 < rate < 1e7
    for name in (*params.hookpoints, *params.neurons.hookpoints, *params.stability.hookpoints, *params.languages):
        written = Path("data") / f"{name}.parquet"
        assert layer_of(name) >= 0 and written.parent == Path("data") and len(written.name) < 250
    for name in params.hookpoints:
        if not isinstance(params.pretrained.folder, dict) or name in params.pretrained.folder:
            assert ".." not in Path(params.pretrained.place_of(name, 0)[1]).parts


def check(path, key=None):
    """The file is refused by one message, naming it and the key (or one that contradicts it), or can be used."""
    try:
        params = config.load(path)
    except UserError as error:
        first, *others = str(error).split("\n")
        assert first.startswith(f"{path}: ") and len(first) < 1000, first
        assert all(line.startswith(f"       {path}: ") for line in others), error
        if key is not None:
            assert re.search(rf"{re.escape(key.split('.')[0])}", str(error)), f"{key}: {error}"
        assert all(line.isprintable() for line in str(error).split("\n")), repr(str(error))
    else:
        use(params)


@settings(SAME, max_examples=600)
@given(data=st.data())
def test_a_mutated_tree_is_refused_by_its_key_or_runs(tmp_path, data):
    content = copy.deepcopy(LOADED[data.draw(st.sampled_from(sorted(LOADED)), label="file")])
    how = st.sampled_from(["set"] * 6 + ["delete", "wrap", "nest", "twice", "empty", "rename", "add"])
    path = data.draw(st.sampled_from(list(places(content))), label="path")
    key = change(content, path, data.draw(how, label="how"), data.draw(VALUES, label="value"))
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(content, text)
    file = tmp_path / "params.yaml"
    file.write_text(text.getvalue(), encoding="utf-8", errors="surrogatepass")
    check(file, key)


@settings(SAME, max_examples=400)
@given(
    place=st.integers(0, len(BARE)),
    length=st.sampled_from([0, 0, 1, 1, 5, 40, 10**6]),
    put=st.sampled_from([
        "", "\t", ": ", "- ", "[", "{", "&a ", "*a", "!!python/object/apply:os.system ", "!!binary ", "%YAML 1.1\n",
        "---\n", "...\n", "\r\n", "\r", "\x00", "\ufeff", "'", '"', "|", "? ", "<<: *a\n", "#", "\u2028", "\x85",
        "en: ", "1" * 5000,
    ]) | st.text(max_size=8),
)  # fmt: skip
def test_a_mutated_text_is_refused_or_runs(tmp_path, place, length, put):
    file = tmp_path / "params.yaml"
    file.write_bytes((BARE[:place] + put + BARE[place + length :]).encode("utf-8", "surrogatepass"))
    check(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "not valid YAML: 'utf-8' codec"),
        ("languages: [français]".encode("latin-1"), "not valid YAML: 'utf-8' codec"),
        (b"train:\n\tk: 4\n", "not valid YAML: .*line 2, column 1"),
        (b"train:\n  k: 4\n  k: 8\n", "not valid YAML: .*duplicate key.*line 3"),
        (b"a: !!python/object/apply:os.system [true]\n", "not valid YAML: could not determine a constructor"),
        (b"", "expected sections such as 'train:', got NoneType"),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_line(tmp_path, content, message):
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(UserError, match=rf"params\.yaml: {message}"):
        config.load(tmp_path / "params.yaml")


def test_a_folder_in_place_of_the_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"params\.yaml: "):
        config.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").mkdir()
    with pytest.raises(UserError, match=r"params\.yaml: Is a directory"):
        config.load(tmp_path / "params.yaml")


def test_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    (tmp_path / "params.yaml").write_bytes(b"\xef\xbb\xbf" + PARAMS.read_bytes().replace(b"\n", b"\r\n"))
    assert config.load(tmp_path / "params.yaml") == config.load(PARAMS)


def test_norway_is_a_language(tmp_path):
    (tmp_path / "params.yaml").write_text(PARAMS.read_text().replace("- de\n", "- no\n"))
    assert config.load(tmp_path / "params.yaml").languages[1] == "no"


def test_the_password_in_an_endpoint_is_not_repeated(tmp_path):
    text = PARAMS.read_text().replace("  endpoint:\n", "  endpoint: https://me:hunter2@localhost/v1\n")
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match="explain.endpoint: .* without user, password or key") as error:
        config.load(tmp_path / "params.yaml")
    assert "hunter2" not in str(error.value)
