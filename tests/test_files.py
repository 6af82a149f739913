"""Writing whole or not at all, re-hashing the cache, progress lines, and errors that a user can read."""

import ast
import errno
import hashlib
import io
import json
import logging
import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from closure import ROOT

from babelscope.core import files, fingerprint, resume, stage
from babelscope.core.errors import UserError, nearest
from babelscope.core.fingerprint import dvc_md5
from babelscope.core.progress import Progress
from babelscope.tracking import verify


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
    assert "extract: 40.0 of 100 tokens" in caplog.text and caplog.text.endswith(" left\n")


def test_progress_says_when_it_began_to_work_and_how_long_it_took(caplog, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.delenv("CI", raising=False)
    with caplog.at_level(logging.INFO), Progress("encode", 500, "tokens") as progress:
        for seconds in (100.5, 101.5, 105.0, 112.0, 120.0):
            now[0] = seconds
            progress.update(100)
    assert caplog.messages == [
        "encode: 200 of 500 tokens in 00:01, 133 tokens/s, 00:02 left",
        "encode: 400 of 500 tokens in 00:12, 33.3 tokens/s, 00:03 left",
        "encode: 500 of 500 tokens in 00:20, 25.0 tokens/s, 00:00 left",
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
    program = (
        "from babelscope import config\nfrom babelscope.core import stage\nstage.run(lambda: config.load() and None)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: params.yaml: no such file; run from the root of the repository\n"


def test_verify_reports_through_the_same_door(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    cache_with(tmp_path / ".dvc/cache/files/md5", b"a").write_bytes(b"b")
    with pytest.raises(UserError, match="1 of 1 cached files are corrupt"):
        verify.main()


def stores_differ(monkeypatch):
    """Renames from one folder to another fail, as they do between two file systems."""
    rename = Path.replace

    def replace(source, target):
        if source.parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(source, target)

    monkeypatch.setattr(Path, "replace", replace)


@pytest.mark.parametrize("across", [False, True])
def test_a_file_moves_also_to_another_file_system(tmp_path, monkeypatch, across):
    if across:
        stores_differ(monkeypatch)
    source, target = tmp_path / "scratch/shard", tmp_path / "data/h/shard"
    source.parent.mkdir()
    source.write_bytes(b"rows")
    files.move(source, target)
    assert target.read_bytes() == b"rows" and not source.exists()
    assert [path.name for path in target.parent.iterdir()] == ["shard"]


def test_a_stage_deletes_what_its_earlier_runs_have_left_and_nothing_of_others(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["stages/train.py", "layers.6"])

    def leave(name):
        folder = tmp_path / ".scratch" / name
        folder.mkdir(parents=True)
        (folder / "state.pt").write_text("x")

    own, old, other = (f"train@layers.6.{'a' * 32}", f"train@layers.6.{'b' * 32}", f"train@layers.6.mlp.{'c' * 32}")
    for name in (own, old, other):
        leave(name)
    assert resume.scratch("a" * 32).name == "a" * 32 and len(list((tmp_path / ".scratch").iterdir())) == 3
    with stage.alone():
        assert resume.scratch("a" * 32) == tmp_path / ".scratch" / own
        assert {path.name for path in (tmp_path / ".scratch").iterdir()} == {own, other, "locks"}
        leave(old)
    # At the end there is nothing to resume: whatever is left of this stage goes.
    assert {path.name for path in (tmp_path / ".scratch").iterdir()} == {other, "locks"}
    leave(old)
    with pytest.raises(UserError), stage.alone():
        raise UserError("a failed run may be resumed")
    assert (tmp_path / ".scratch" / old).is_dir()
    # Without locks nobody knows whether another process is at work on it.
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "no locks")))
    with stage.alone():
        resume.scratch("a" * 32)
    assert (tmp_path / ".scratch" / old).is_dir()


def test_what_dvc_has_hashed_is_not_read_again(tmp_path, monkeypatch):
    run = lambda *command: subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)  # noqa: E731
    run(sys.executable, "-m", "dvc", "init", "--no-scm", "-q")
    (tmp_path / ".dvcignore").write_text("*.tmp\n")
    folder = tmp_path / "data/h"
    (folder / "input").mkdir(parents=True)
    for name in ("shard-0", "input/shard-0", "x.tmp"):
        (folder / name).write_bytes(name.encode())
    expected = fingerprint.content_md5(folder)
    monkeypatch.setattr(fingerprint, "_SMALL", 0)
    assert fingerprint.dvc_md5(folder) == expected

    import dvc_data.hashfile.hash as hashing

    read = []
    original = hashing._hash_file
    monkeypatch.setattr(
        hashing, "_hash_file", lambda path, *rest, **more: read.append(path) or original(path, *rest, **more)
    )
    assert fingerprint.dvc_md5(folder) == expected
    assert not [path for path in read if str(path).startswith(str(tmp_path))]
    (folder / "shard-0").write_bytes(b"others")
    assert fingerprint.dvc_md5(folder) == fingerprint.content_md5(folder) != expected


def test_without_dvcs_private_functions_the_hashes_are_the_same(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    (tmp_path / ".dvcignore").write_text((ROOT / ".dvcignore").read_text() + "/data/h/out*\n!/data/h/outside\nbuild/\n")
    folder = tmp_path / "data/h"
    for name in ("shard-0", "input/shard-0", "x.tmp", ".gitignore", "__pycache__/x.pyc", "input/.gitignore", "outer",
                 "outside", "input/outer", "input/build/x", "build"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    monkeypatch.setattr(fingerprint, "_SMALL", 0)
    expected = fingerprint.dvc_md5(folder), fingerprint.content_md5(folder)

    def gone(*_):
        raise ImportError("cannot import name")

    monkeypatch.setattr(fingerprint, "_dvc_hash", gone)
    assert (fingerprint.dvc_md5(folder), fingerprint.content_md5(folder)) == expected
    assert expected[0] == expected[1]


# Refuses what Windows lacks (`fcntl` and others) to babelscope's own modules, and takes it out of `os` and `signal`.
ELSEWHERE = """
import builtins, importlib, os, pkgutil, signal, sys
real = builtins.__import__
def limited(name, globals=None, *rest, **more):
    by = (globals or {}).get("__name__", "")
    if name in {"fcntl", "resource", "pwd", "grp", "termios"} and by.startswith("babelscope"):
        raise ImportError(f"no {name} on this system")
    return real(name, globals, *rest, **more)
builtins.__import__ = limited
import babelscope.core.stage, babelscope.core.files, babelscope.config
import torch, lightning.pytorch, transformers, datasets, polars, mlflow, dvc.repo, altair, jinja2
for name in ("fchmod", "getuid", "geteuid", "fork", "sched_getaffinity"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP"):
    delattr(signal, name)
sys.platform = "win32"
for name in [name for name in sys.modules if name.startswith(("babelscope.core", "babelscope.config"))]:
    del sys.modules[name]
import babelscope
for module in pkgutil.walk_packages(babelscope.__path__, "babelscope."):
    if not module.name.endswith(("__main__", "triton_kernels")):
        importlib.import_module(module.name)
from babelscope.core import files, stage
from pathlib import Path
files.write_json(Path("x.json"), {"a": 1})
sys.argv = ["stages/x.py"]
stage.end_with_dvc()
with stage.alone():
    print("ran")
"""


def test_every_package_imports_and_a_stage_runs_on_systems_without_fcntl(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "DVC_ROOT": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "ran\n", done.stderr
    assert (tmp_path / "x.json").is_file()


def caches(monkeypatch, folder, **variables):
    """HF_HOME and others, as `stage.keep_caches` leaves them."""
    names = ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"DVC_ROOT": str(folder), **variables}.items():
        monkeypatch.setenv(name, value)
    stage.keep_caches()
    return {name: os.environ[name] for name in names if name in os.environ}


def test_a_home_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch, caplog):
    home, ours = tmp_path / "home", tmp_path / ".scratch/caches"
    (home / ".cache/huggingface/hub").mkdir(parents=True)
    assert caches(monkeypatch, tmp_path, HOME=str(home)) == {} and not caplog.text
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(home) and allowed(path, mode))
    expected = {"HF_HOME": str(ours / "huggingface"), "TRITON_CACHE_DIR": str(ours / "triton")}
    assert caches(monkeypatch, tmp_path, HOME=str(home)) == {
        **expected, "HF_HUB_CACHE": str(home / ".cache/huggingface/hub"),
    }  # fmt: skip
    assert f"{home}/.cache/huggingface: cannot be written; {ours} is used instead" in caplog.text
    assert caches(monkeypatch, tmp_path, HOME=str(home / "missing")) == expected
    (tmp_path / "file").touch()
    assert caches(monkeypatch, tmp_path, HOME=str(tmp_path / "file/x")) == expected
    # A user's own setting wins.
    own = str(tmp_path / "own")
    assert caches(monkeypatch, tmp_path, HOME=str(home), HF_HOME=own) == {"HF_HOME": own}
    assert caches(monkeypatch, tmp_path, HOME=str(home), HF_HOME="relative") == {"HF_HOME": "relative"}
    assert caches(monkeypatch, tmp_path, HOME=str(home), HF_HOME="~nobody-of-this-name/x") == expected

    def unsearchable(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", unsearchable)
    assert caches(monkeypatch, tmp_path, HOME=str(home))["HF_HOME"] == expected["HF_HOME"]


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux'")
def test_a_stage_whose_dvc_was_gone_before_it_began_ends(monkeypatch, tmp_path):
    # The process that started it is another one than that which it saw first.
    code = "import os; from babelscope.core import stage; stage._PARENT += {}; stage.end_with_dvc(); print('goes on')"
    environment = {**os.environ, "DVC_ROOT": str(tmp_path)}
    for other, rc, out in ((0, 0, "goes on\n"), (1, -9, "")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(other)], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (rc, out), done.stderr


def test_threads_soon_sleep_while_they_wait_unless_the_user_says_otherwise():
    code = "import sys, babelscope, os; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    for own, found in (({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")):
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))} | own
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"{found}\n"


# Packages whose module has another name; and what others import for us (transformers) or run for us (DVC).
MODULES = {"fasttext-predict": "fasttext", "vl-convert-python": "vl_convert", "pyyaml": "yaml"}
FOR_OTHERS = {"ruamel.yaml.clib", "accelerate", "gguf", "bitsandbytes", "dvc_s3"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["explain"], *extras["s3"], *extras["quantized"]]
    names = {re.split(r"[><=\[]", entry)[0].lower() for entry in declared}
    modules = {MODULES.get(name, name).replace("-", "_") for name in names}
    imported = set()
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "stages").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    optional = {"triton"}  # comes with CUDA builds of torch
    assert imported - set(sys.stdlib_module_names) - {"babelscope"} - optional == modules - FOR_OTHERS


def test_the_tools_of_the_tests_are_no_part_of_what_the_pipeline_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name = lambda line: re.split(r"[><=\[]", line)[0].lower().replace("-", "_")  # noqa: E731
    pins = {file: {name(line) for line in (ROOT / file).read_text().splitlines() if "==" in line}
            for file in ("requirements.txt", "requirements-dev.txt")}  # fmt: skip
    tools = {name(entry) for entry in project["optional-dependencies"]["dev"]}
    assert tools - {"ruamel.yaml"} <= pins["requirements-dev.txt"]  # which DVC brings
    assert not pins["requirements-dev.txt"] & pins["requirements.txt"]
    assert {name(entry) for entry in project["dependencies"]} <= pins["requirements.txt"]
