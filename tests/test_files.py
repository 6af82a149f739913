"""Writing whole or not at all, re-hashing the cache, progress lines, and errors that a user can read."""

import hashlib
import io
import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from closure import ROOT

from babelscope import files, stage, verify
from babelscope.errors import UserError, nearest
from babelscope.fingerprint import dvc_md5
from babelscope.progress import Progress


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a/b.json"
    files.write_json(path, {"b": 1, "a": "ü"})
    assert path.read_text() == '{\n  "a": "ü",\n  "b": 1\n}\n' and files.read_json(path) == {"a": "ü", "b": 1}

    def half(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, half)
    assert [p.name for p in path.parent.iterdir()] == ["b.json"] and '"b": 1' in path.read_text()


def test_a_written_file_is_as_readable_as_any_other(tmp_path):
    def private(temporary):
        temporary.write_text("x")
        temporary.chmod(0o600)

    files.write_atomically(tmp_path / "x", private)
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_no_number_that_is_none_gets_into_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x.json", {"a": float("nan")})


def cache_with(folder, content, suffix=""):
    md5 = hashlib.md5(content).hexdigest()
    path = folder / md5[:2] / f"{md5[2:]}{suffix}"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def test_verify_finds_a_flipped_bit(tmp_path):
    good = [cache_with(tmp_path, b"a"), cache_with(tmp_path, b"[]", ".dir")]
    assert verify.corrupt(tmp_path) == ([], 2)
    good[1].write_bytes(b"[}")
    assert verify.corrupt(tmp_path) == ([good[1]], 2)


def test_verify_names_every_output_that_is_not_what_dvc_lock_says(tmp_path):
    outs = {"data/a.json": b"{}", "data/sae/h/cfg.json": b"{ }", "data/sae/h/w.safetensors": b"weights"}
    for name, content in outs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "params.yaml").write_text("hookpoints:\n- h\n")
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  sample:\n    cmd: x\n  train:\n    matrix:\n      hookpoint: ${hookpoints}\n    cmd: x\n"
    )
    folder = dvc_md5(tmp_path / "data/sae/h")
    entries = [(f"train@{h}", f"data/sae/{h}", md5) for h, md5 in (("h", folder), ("gone", "0" * 32))]
    lock = {"sample": [{"path": "data/a.json", "md5": dvc_md5(tmp_path / "data/a.json")}]}
    lock |= {name: [{"path": path, "md5": md5}] for name, path, md5 in entries}
    lock = {"stages": {name: {"cmd": "x", "outs": out} for name, out in lock.items()}}
    (tmp_path / "dvc.lock").write_text(json.dumps(lock))
    assert verify.changed(tmp_path) == ([], 2)  # what was removed from params.yaml does not count
    (tmp_path / "data/sae/h/w.safetensors").write_bytes(b"weighty")
    assert verify.changed(tmp_path) == ([Path("data/sae/h")], 2)
    listing = [
        {"md5": hashlib.md5(content).hexdigest(), "relpath": name.removeprefix("data/sae/h/")}
        for name, content in outs.items() if name.startswith("data/sae")
    ]  # fmt: skip
    cached = tmp_path / verify.CACHE / folder[:2] / folder[2:]
    cached.parent.mkdir(parents=True)
    cached.write_text(json.dumps(listing))
    assert verify.changed(tmp_path) == ([Path("data/sae/h/w.safetensors")], 2)
    (tmp_path / "data/a.json").unlink()
    (tmp_path / "data/sae/h/new").touch()
    assert verify.changed(tmp_path)[0] == [
        Path(f"data/{name}") for name in ("a.json", "sae/h/new", "sae/h/w.safetensors")
    ]


def test_progress_tells_rate_and_remaining_time_in_a_log(caplog, monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with caplog.at_level(logging.INFO), Progress("extract", 130, "tokens", every=0) as progress:
        progress.skip(30)
        progress.update(40)
    assert "extract: 40 of 100 tokens" in caplog.text and "s left" in caplog.text


def test_progress_says_when_it_began_to_work_and_how_long_it_took(caplog, monkeypatch):
    clock = iter([100.0, 100.5, 101.5, 105.0, 112.0, 120.0])
    monkeypatch.setattr("babelscope.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.delenv("CI", raising=False)
    with caplog.at_level(logging.INFO), Progress("encode", 500, "tokens") as progress:
        for _ in range(4):
            progress.update(100)
    assert caplog.messages == [
        "encode: 200 of 500 tokens, 133 tokens/s, 2 s left",
        "encode: 400 of 500 tokens, 33 tokens/s, 3 s left",
        "encode: 400 tokens in 20 s, 20 tokens/s",
    ]


def test_work_that_fails_or_takes_no_time_has_no_closing_line(caplog, monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with caplog.at_level(logging.INFO), Progress("encode", 10, "tokens") as progress:
        progress.update(10)
    with (
        caplog.at_level(logging.INFO), pytest.raises(ValueError), Progress("encode", 9, "tokens", every=0) as progress
    ):  # fmt: skip
        progress.update(9)
        raise ValueError
    assert not caplog.messages


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("variable", ["NO_COLOR", "CI"])
def test_progress_is_a_bar_without_colour_on_a_terminal_and_none_in_ci(caplog, monkeypatch, variable):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr("sys.stderr", screen := Terminal())
    with caplog.at_level(logging.INFO), Progress("encode", 100, "tokens") as progress:
        progress.update(50)
        assert progress.every == (60 if variable == "CI" else 10)
    assert "\x1b" not in screen.getvalue() and not caplog.records
    shown = screen.getvalue().rpartition("\r")[2]
    assert shown == "" if variable == "CI" else "encode:  50%" in shown and "tokens/s" in shown


def test_a_closing_table_is_aligned(caplog):
    with caplog.at_level(logging.INFO):
        stage.table(["language", "method", "texts"], [["en", "count", 7], ["pt-BR", "-", "1,024"]], labels=2)
    assert caplog.messages == [
        "language  method  texts",
        "en        count       7",
        "pt-BR     -       1,024",
    ]


@pytest.mark.parametrize(
    ("wrong", "allowed", "hint"),
    [
        ("ratoi", ["ratio", "k"], "allowed: k, ratio (did you mean 'ratio'?)"),
        ("x", [], "allowed: nothing"),
        ("layers.99", [f"layers.{i}" for i in range(30)], "nearest: layers.9, layers.29, layers.19 (of 30)"),
    ],
)
def test_hints(wrong, allowed, hint):
    assert nearest(wrong, allowed) == hint


def test_a_user_error_ends_a_stage_with_one_message_and_code_1(tmp_path):
    program = "from babelscope import stage, config\nstage.run(lambda: config.load() and None)"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: params.yaml: no such file; run from the root of the repository\n"


def test_verify_reports_through_the_same_door(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    cache_with(tmp_path / ".dvc/cache/files/md5", b"a").write_bytes(b"b")
    with pytest.raises(UserError, match="1 of 1 cached files are corrupt"):
        verify.main()
