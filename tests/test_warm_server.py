"""`core.warm`: a stage that runs in a fork of the server is like one that runs in its own process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from babelscope.core import warm

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the server needs Linux")

SCRIPT = """
import json, os, signal, sys
from babelscope.core import stage


@stage.script
def main() -> None:
    seen = {"arguments": sys.argv, "folder": os.getcwd(), "path": sys.path[:2], "in": sys.stdin.read(),
            "environment": {key: value for key, value in os.environ.items() if key not in ("BABELSCOPE_SERVER", "_")},
            "name": __name__, "doc": __doc__, "signals": [str(signal.getsignal(2)), *signal.pthread_sigmask(0, [])],
            "streams": [[stream.errors, stream.encoding, stream.write_through] for stream in (sys.stdin, sys.stdout)]}
    print(json.dumps(seen), flush=True)
    print("to stderr", file=sys.stderr)
    print("torch" in sys.modules, os.getpid(), file=open("ran", "w"))
    exec(sys.argv[1])
"""
# What DVC is to a stage: a parent process that runs commands one after the other, read from its standard input.
DVC = """
import json, signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it for what it starts in the background
for line in sys.stdin:
    job = json.loads(line)
    with open("out", "w") as out, open("err", "w") as err:
        given = subprocess.PIPE if job["waits"] else subprocess.DEVNULL
        stage = subprocess.Popen(job["command"], env=job["env"], text=True, stdin=given, stdout=out, stderr=err)
        if job["waits"]:
            stage.communicate("given")
            print(stage.returncode, flush=True)
        else:
            print(stage.pid, flush=True)
"""


class Parent:
    """A process in the place of DVC, in a folder with the script above."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "script.py").write_text(SCRIPT)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", DVC], cwd=folder, text=True, stdin=pipe, stdout=pipe)

    def run(
        self, code: str, waits: bool = True, env: Mapping[str, str] | None = None, options: Sequence[str] = ()
    ) -> int:
        """Run `code` in the script; returns the exit code, or the id of the process."""
        (self.folder / "ran").unlink(missing_ok=True)
        command = [sys.executable, *options, "script.py", code]
        places = {"PYTHONPATH": str(ROOT / "src"), "DVC_ROOT": str(self.folder)}
        inherited = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
        job = {"command": command, "env": inherited | places | dict(env or {}), "waits": waits}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def ran(self) -> tuple[bool, int]:
        """Whether torch was there before the script, and the id of the process that ran it."""
        until(lambda: (self.folder / "ran").is_file() and (self.folder / "ran").read_text().endswith("\n"))
        forked, process = (self.folder / "ran").read_text().split()
        return forked == "True", int(process)

    def out(self, name: str = "out") -> str:
        return (self.folder / name).read_text()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def quick(folder: Path, **modules: str) -> tuple[Parent, dict[str, str]]:
    """A parent, and the environment in which its server has stand-ins for all packages, so that it is there at once."""
    quiet = "import types; cuda = xpu = types.SimpleNamespace(_is_in_bad_fork=lambda: False)"
    names = {name.partition(".")[0] for name in warm._PACKAGES}
    (folder / "packages").mkdir()
    for name, text in (dict.fromkeys(names, "") | {"torch": quiet} | modules).items():
        (folder / "packages" / f"{name}.py").write_text(text)
    return Parent(folder), {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{folder / 'packages'}"}


def has_server(parent: Parent) -> bool:
    """Whether the server that a parent's stages have started still runs."""
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"core/warm.py" in (place / "cmdline").read_bytes() and (place / "cwd").samefile(parent.folder):
                return lives(int(place.name))
    return False


def status(process: int) -> list[str]:
    """The state and the parent of a process, and more; see proc(5)."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def lives(process: int) -> bool:
    try:
        return status(process)[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parent]:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        pytest.skip("the system has no process descriptors")
    parent = Parent(tmp_path_factory.mktemp("dvc"))
    assert parent.run("") == 0
    assert not parent.ran()[0]  # the first stage runs in its own process and starts the server
    until(lambda: parent.run("") == 0 and parent.ran()[0])  # on a busy machine, it may not be ready for the second
    yield parent
    parent.end()


def alone(parent: Parent, code: str) -> tuple[Any, str, int]:
    """The same in a process of its own, since it has a variable that the others lack."""
    status = parent.run(code, env={"OTHER": "1"})
    assert not parent.ran()[0]
    seen = json.loads(parent.out())
    assert seen["environment"].pop("OTHER") == "1"
    return seen, parent.out("err"), status


@pytest.mark.parametrize("code", ["", "sys.exit(3)", "raise SystemExit('a message')", "os._exit(7)"])
def test_a_fork_is_like_a_process_of_its_own(parent: Parent, code: str) -> None:
    status = parent.run(code)
    forked, _ = parent.ran()
    assert forked
    seen, errors = json.loads(parent.out()), parent.out("err")
    assert seen["in"] == "given" and seen["arguments"] == ["script.py", code] and seen["name"] == "__main__"
    assert (seen, errors, status) == alone(parent, code)


def test_an_error_has_its_traceback_and_a_signal_its_number(parent: Parent) -> None:
    assert parent.run("1 / 0") == 1 and parent.ran()[0]
    assert "ZeroDivisionError" in parent.out("err") and parent.out("err").startswith("to stderr\nTraceback")
    assert parent.run("from babelscope.core.errors import UserError\nraise UserError('no')") == 1 and parent.ran()[0]
    assert parent.out("err") == "to stderr\nerror: no\n"
    assert parent.run("os.kill(os.getpid(), 9)") == -signal.SIGKILL and parent.ran()[0]
    assert parent.run("os.kill(os.getpid(), 15)") == -signal.SIGTERM


def test_a_stage_with_options_of_python_has_them(parent: Parent) -> None:
    assert parent.run("sys.exit(sys.flags.optimize)", options=["-OO"]) == 2 and not parent.ran()[0]


def test_threads_compute_the_same_in_a_fork(parent: Parent) -> None:
    (parent.folder / "code.py").write_text("""
import hashlib, torch, polars as pl
torch.manual_seed(0); torch.set_num_threads(2)
x = torch.randn(600, 500) @ torch.randn(500, 400)
y = pl.DataFrame({"a": range(9999)}).group_by(b=pl.col("a") % 7).agg(pl.col("a").sum()).sort("b")
print(hashlib.md5(x.numpy().tobytes() + y.write_csv().encode()).hexdigest(), file=sys.stderr)""")
    code = "exec(open('code.py').read())"
    assert parent.run(code) == 0 and parent.ran()[0]
    errors = parent.out("err")
    assert errors == alone(parent, code)[1]


def test_a_process_that_a_stage_starts_is_a_fork_too(parent: Parent) -> None:
    code = """
import subprocess, babelscope.models.matmul  # which sets a variable
ran = "print('torch' in sys.modules)"
subprocess.run([sys.executable, "script.py", ran], env=os.environ | {"BABELSCOPE_AHEAD": "1"}, check=True)"""
    assert parent.run(code) == 0
    assert parent.out().endswith("\nTrue\n")


def test_a_fork_ends_with_the_process_that_waits_for_it(parent: Parent) -> None:
    waiting = parent.run("import time; time.sleep(100)", waits=False)
    forked, process = parent.ran()
    assert forked and process != waiting and lives(process)
    os.kill(waiting, signal.SIGKILL)
    until(lambda: not lives(process))


def test_an_interrupted_fork_shows_one_traceback(parent: Parent) -> None:
    waiting = parent.run("import time; time.sleep(100)", waits=False)
    forked, process = parent.ran()
    assert forked
    time.sleep(0.1)
    for one in (waiting, process):  # as Ctrl-C does
        os.kill(one, signal.SIGINT)
    until(lambda: not lives(process) and not lives(waiting))
    assert parent.out("err").count("Traceback") == 1 and parent.out("err").endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize(
    "torch",
    ["raise ImportError", "import types; cuda = xpu = types.SimpleNamespace(_is_in_bad_fork=lambda: True)"],
    ids=["absent", "GPU"],
)
def test_no_stage_is_forked_without_torch_or_where_an_import_has_used_a_gpu(tmp_path: Path, torch: str) -> None:
    parent, env = quick(tmp_path, torch=torch)
    assert parent.run("", env=env) == 0
    until(lambda: not has_server(parent))
    parent.run("", env=env, waits=False)  # an endless chain of forks would not write that it ran
    assert not parent.ran()[0]
    parent.end()


def test_a_stage_sees_packages_that_have_been_installed_since(tmp_path: Path) -> None:
    parent, env = quick(tmp_path, altair="import sys; sys.path.append(sys.prefix)")  # as setuptools does
    assert parent.run("", env=env) == 0 and not parent.ran()[0]
    assert parent.run("", env=env) == 0 and parent.ran()[0]
    (tmp_path / "packages" / "new.py").touch()
    assert parent.run("import new", env=env) == 0 and not parent.ran()[0]
    parent.end()


def test_where_no_process_can_be_added_the_others_go_on(tmp_path: Path) -> None:
    fork = """
import os
fork = os.fork
def checked():
    if os.path.exists("full"):
        raise BlockingIOError
    return fork()
os.fork = checked"""
    parent, env = quick(tmp_path, altair=fork)
    assert parent.run("", env=env) == 0
    parent.run("import time; time.sleep(100)", env=env, waits=False)
    forked, process = parent.ran()
    assert forked
    (tmp_path / "full").touch()
    assert parent.run("", env=env) == 0 and not parent.ran()[0]
    (tmp_path / "full").unlink()
    assert parent.run("", env=env) == 0 and parent.ran()[0] and lives(process)
    parent.end()


def test_the_first_stage_starts_one_server_without_a_warning(tmp_path: Path) -> None:
    code = """
import subprocess
subprocess.run([sys.executable, "script.py", ""], env=os.environ | {"BABELSCOPE_AHEAD": "1"}, check=True)"""
    parent, env = quick(tmp_path)
    assert parent.run(code, env=env | {"PYTHONWARNINGS": "default"}) == 0
    assert parent.ran()[0] and "still running" not in parent.out("err")
    parent.end()


def test_the_server_imports_nothing_more_once_dvc_has_ended(tmp_path: Path) -> None:
    slow = "import os, time\nopen('begun', 'w')\nwhile not os.path.exists('go'): time.sleep(0.02)"
    parent, env = quick(tmp_path, numpy=slow, polars="open('imported', 'w')")
    assert parent.run("", env=env) == 0
    until((tmp_path / "begun").exists)
    parent.end()
    (tmp_path / "go").touch()
    until(lambda: not has_server(parent))
    assert not (tmp_path / "imported").exists()


def test_the_server_ends_if_an_import_does_not(tmp_path: Path) -> None:
    endless = """
import signal
assert signal.setitimer(signal.ITIMER_REAL, 0.1)[0] > 50
while True: pass"""
    parent, env = quick(tmp_path, numpy=endless)
    assert parent.run("", env=env) == 0
    until(lambda: not has_server(parent))
    parent.end()


def test_what_a_stage_starts_ends_with_it(tmp_path: Path) -> None:
    code = """
import subprocess, time
child = subprocess.Popen([sys.executable, "script.py", "import time; time.sleep(100)"])
print(child.pid, flush=True)
time.sleep(100)"""
    parent, env = quick(tmp_path)
    assert parent.run("", env=env) == 0
    parent.run(code, env=env, waits=False)
    until(lambda: parent.out().count('"arguments"') == 2)  # both have begun
    (child,) = (int(line) for line in parent.out().splitlines() if line.isdigit())
    os.kill(int(status(child)[1]), signal.SIGKILL)
    until(lambda: not lives(child))
    parent.end()


def test_a_profiler_goes_on_after_a_script(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {key: value for key, value in os.environ.items() if key != "DVC_ROOT"}
    command = [sys.executable, "-m", "cProfile", "script.py", ""]
    kwargs = {"stdin": subprocess.DEVNULL, "capture_output": True, "check": True, "text": True}
    done = subprocess.run(command, cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT / "src")}, **kwargs)
    assert "function calls" in done.stdout


def test_all_end_with_dvc(parent: Parent) -> None:  # the last test, since no other can follow
    waiting = parent.run("import time; time.sleep(100)", waits=False)
    forked, process = parent.ran()
    assert forked
    server = int(status(process)[1])
    assert "core/warm.py" in Path(f"/proc/{server}/cmdline").read_text()
    parent.end()
    until(lambda: not any(map(lives, (server, process, waiting))))
