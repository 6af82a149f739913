"""PyYAML with our rules reads what DVC reads, or refuses it with a message."""

import math
import re

import pytest
from closure import ROOT
from dvc.utils.serialize import dumps_yaml, loads_yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from babelscope import config
from babelscope.core.errors import UserError

FILES = [path for path in sorted(ROOT.rglob("*.y*ml")) + [ROOT / "dvc.lock"]
         if path.is_file() and path.name != "mkdocs.yml"  # which has a tag of its own, for MkDocs alone
         and not {".venv", ".bench", ".scratch", "data", "reports"} & set(path.parts)]  # fmt: skip
SAME = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# ruff: noqa: E501
WORDS = [
    "no", "on", "y", "Yes", "true", "True", "tRUE", "null", "~", "", "12:30", "1:2:3", "1e-3", "1.0e-3", "1.e3", "1e3", "010",
    "0o10", "0o9", "08", "0x1F", "0X1F", "0b11", "+1", "-1", "1_000", "1__0", "_1", "-_", "+", "-", ".", "..", "._", ".5", "+.5",
    ".5e3", ".5e+3", "5.", "1_0.5", ".inf", "-.INF", "+.inf", ".nan", "-.nan", "2026-01-01", "2026-1-1", "2026-01-01 12:00:00",
    "2026-01-01t1:00:00Z", "=", "<<", "a", "a:b", "a#b", "en", "pt-BR", "layers.6.mlp", "x y", "1 2", "1.2.3", "é", "😀", "1e400",
    "0o_", "0x_", "0b", "١", "'no'", '"1"', "'a''b'", '"a\\n"', "!!str 1", "!!int '1'", "!!float 1", "&a 1",
]  # fmt: skip


def ours(text, folder):
    (folder / "x.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    return config.read_yaml(folder / "x.yaml")


def same(one, other):
    """Equal, and of the same types; NaN is like NaN."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(map(same, [*one, *one.values()], [*other, *other.values()])) and len(one) == len(other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return type(one) is type(other) and (one == other or both_nan)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_yaml_file_here_is_read_as_dvc_reads_it(path):
    assert same(config.read_yaml(path), loads_yaml(path.read_text()))


def test_there_are_files():
    assert {ROOT / "params.yaml", ROOT / "dvc.yaml", ROOT / "dvc.lock"} < set(FILES) and len(FILES) > 6


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=20),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=9), x, max_size=3),
    max_leaves=8,
)


@settings(SAME, max_examples=300)
@given(TREES)
def test_what_dvc_writes_is_read_as_dvc_reads_it(tmp_path, tree):
    try:
        text = dumps_yaml({"key": tree})
        expected = loads_yaml(text)
    except Exception:  # DVC cannot write or read it, either
        return
    assert same(ours(text, tmp_path), expected)


def check(text, folder):
    """We read what DVC reads, or refuse it. What DVC refuses never becomes another document than DVC's."""
    try:
        found = ours(text, folder)
    except UserError as error:
        assert str(error).startswith(f"{folder / 'x.yaml'}: not valid YAML: ")
        return
    try:
        expected = loads_yaml(text)
    except Exception:
        return
    assert same(found, expected), (found, expected)


@settings(SAME, max_examples=400)
@given(word=st.sampled_from(WORDS) | st.from_regex(r"[-+0-9.eExob_]{1,7}", fullmatch=True), form=st.integers(0, 4))
def test_a_scalar_means_what_it_means_to_dvc(tmp_path, word, form):
    check(["{}\n", "a: {}\n", "- {}\n", "a: [{}, 1]\n", "{}: 1\n"][form].format(word), tmp_path)


@settings(SAME, max_examples=150)
@given(data=st.data())
def test_a_mutated_file_is_read_as_dvc_reads_it_or_refused(tmp_path, data):
    text = re.sub(r"(?m)^\s*#.*\n", "", data.draw(st.sampled_from(SHORT)))
    at = data.draw(st.integers(0, len(text)))
    put = data.draw(st.sampled_from([*WORDS, "\t", ": ", "- ", "[", "]", "{", "}", "? ", "'", '"', "|\n", ">-\n", "\n", "  ",
                                     "#", " #", "<<: *a\n", "*a", "---\n", "...\n", "%YAML 1.1\n---\n", ",", "\\"]))  # fmt: skip
    check(text[:at] + put + text[at + data.draw(st.integers(0, 9)) :], tmp_path)


SHORT = [path.read_text() for path in FILES if path.stat().st_size < 5_000]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", r"duplicate key 'a' in .*line 2, column 1"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", r"'<<' is not supported here; write it between quotes if it is a string"),
        ("a: 2026-01-01\n", r"'2026-01-01' is not supported here; write it between quotes .*line 1, column 4"),
        ("[a]: 1\n", "a list or a mapping cannot be a key"),
        ("a: 0o_\n", "invalid literal for int"),
        ("%YAML 1.1\n---\na: no\n", "only YAML 1.2 is read; remove the %YAML line"),
    ],
)
def test_what_is_refused_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=rf"x\.yaml: not valid YAML: {message}"):
        ours(text, tmp_path)


def test_the_reference_is_ruamel():
    assert loads_yaml("a: no\nb: 1e-3\nc: 010\n") == YAML(typ="safe", pure=True).load("a: no\nb: 1e-3\nc: 010\n")
