"""Stages as forks of one process that has imported torch and the like, since DVC starts a new process for every stage.

Importing what a stage uses takes 2 to 5 s, on one core. The first stage of a `dvc repro` starts a server beside itself,
which imports these packages once, and forks a process for each stage that follows. A fork has the arguments,
environment, folder, standard streams and exit code of the process that DVC has started, which waits for it. The server
imports nothing of this package and computes nothing, so a fork computes what a new process does. The server ends when
DVC ends, and a fork ends when the process that waits for it ends.

This file is also the server's program, so it imports the standard library only. It needs Linux. On other systems, and
if anything is unusual, a stage runs in the process that DVC has started.
"""

import gc
import json
import logging
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

# Packages whose import takes more than 0.1 s; those that are not installed are left out.
_PACKAGES = (
    "numpy", "polars", "pyarrow.parquet", "pydantic", "torch", "torch._dynamo", "safetensors.torch", "scipy.stats",
    "transformers.modeling_utils", "transformers.generation", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "altair", "mlflow.store.tracking.sqlalchemy_store",
)  # fmt: skip
# After these stages none follows for which a server would be worthwhile.
_LAST = ("report", "track")
_SERVER = "BABELSCOPE_SERVER"
# Variables that may differ between the stages of a `dvc repro`; no import depends on them.
_OWN = {"BABELSCOPE_AHEAD", _SERVER, "DVC_STAGE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "TQDM_DISABLE"}
# Seconds in which the server must have imported everything, or the stage runs in its own process.
_PATIENCE = 20.0


def run_elsewhere() -> None:
    """Let the server of this `dvc repro` run this process's script, and end with its exit code; return without one."""
    name = _name()
    if name is None:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.settimeout(_PATIENCE)
        server.connect(f"\0{name}")
        if _user(server) != os.getuid() or _read(server, 1) != b"+":  # it has imported everything
            return
        job = {"arguments": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ)}
        content = json.dumps(job).encode()
        server.sendall(struct.pack("=I", len(content)) + content)
        socket.send_fds(server, [b"+"], [0, 1, 2])
        if _read(server, 1) != b"+":  # it runs the script
            return
        server.settimeout(None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the fork, too, which ends by it
        code = struct.pack("=i", -signal.SIGKILL)
        with suppress(OSError):
            code = _read(server, 4) or code  # nothing: the server was killed, and the fork with it
        _end(struct.unpack("=i", code)[0])


def start(environment: dict[str, str]) -> None:
    """Start a server for the stages that follow in this `dvc repro`, unless there is one.

    Parameters
    ----------
    environment: the variables when this process was started; stages with others run in their own processes.
    """
    name = _name()
    if name is None or Path(sys.argv[0]).stem in _LAST or _SERVER in environment:
        return
    beginning = {"name": name, "owner": os.getppid(), "folder": os.getcwd(), "environment": environment}
    command, nothing = [sys.executable, "-P", __file__], subprocess.DEVNULL
    os.environ[_SERVER] = name  # for the processes that this stage starts
    with suppress(OSError):
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=nothing, stderr=nothing)
        server.returncode = 0  # without one, Python would warn that the process is still running
        assert server.stdin is not None
        with server.stdin as stream:
            stream.write(json.dumps(beginning).encode())


def _name() -> str | None:
    """The name of the server's socket, one for each process of DVC; None if there can be no server."""
    if sys.platform != "linux" or "DVC_ROOT" not in os.environ:
        return None
    if sys.orig_argv[1:] != sys.argv:  # a fork, or a script with options of Python, such as `-O` or `-m cProfile`
        return None
    if _SERVER in os.environ:
        return os.environ[_SERVER]
    try:
        since = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
    return f"babelscope-{os.getuid()}-{os.getppid()}-{since}"


def _user(peer: socket.socket) -> int:
    """The user of the process at the other end: any process may open a socket of this name."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _read(peer: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer if the other end closes."""
    content = b""
    while len(content) < size and (part := peer.recv(size - len(content))):
        content += part
    return content


def _end(code: int) -> NoReturn:
    """End as the fork has ended: with its exit code, or by the signal `-code`."""
    if code < 0:
        with suppress(OSError):  # no handler can be set for SIGKILL
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 255)


class _Server:
    """Runs the scripts of processes that DVC has started, each in a fork; `beginning` is what `start` sends."""

    def __init__(self, beginning: dict[str, Any]) -> None:
        self.folder, self.environment = beginning["folder"], beginning["environment"]
        # When a package was last installed or removed, in ns; packages may add folders while they are imported.
        self.installed = {place: os.stat(place).st_mtime_ns for place in sys.path if os.path.isdir(place)}
        self.owner, self.process = os.pidfd_open(beginning["owner"]), os.getpid()
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listening.bind(f"\0{beginning['name']}")  # fails if there is a server already
        self.listening.listen()
        self.jobs: list[tuple[int, int, socket.socket]] = []  # a fork's descriptor and id, and its client

    def load(self) -> None:
        """Import the packages; end the server if DVC has ended or no fork could use them."""
        signal.alarm(60)  # with too little memory, some imports do not end
        for package in _PACKAGES:
            if select.select([self.owner], [], [], 0)[0]:
                sys.exit()
            with suppress(ImportError):
                import_module(package)
        # A fork would lack threads of Python, and a GPU that an import has used, which a trial fork tells.
        torch = sys.modules.get("torch")
        if torch is None or threading.active_count() > 1:
            sys.exit()
        if (trial := os.fork()) == 0:
            os._exit(torch.cuda._is_in_bad_fork() or torch.xpu._is_in_bad_fork())
        if os.waitpid(trial, 0)[1]:
            sys.exit()
        signal.alarm(0)
        gc.freeze()

    def run(self) -> dict[str, Any]:
        """Serve until DVC ends; returns in a fork, with the job that it has to run."""
        while True:
            watched = [part for fork, _, client in self.jobs for part in (fork, client)]
            ready = select.select([self.owner, self.listening, *watched], [], [])[0]
            if self.owner in ready:
                os._exit(0)  # and the forks with it
            for job in [job for job in self.jobs if job[0] in ready or job[2] in ready]:
                self._ended(*job)
            if self.listening in ready:
                client, _ = self.listening.accept()
                asked = None
                with suppress(Exception):  # the client has ended, or has another version of this file
                    asked = self._asked(client)
                if asked is None:
                    client.close()
                elif self._fork(client, asked):
                    return asked

    def _asked(self, client: socket.socket) -> dict[str, Any] | None:
        """The job of a client, with its streams; None if its own process has to run it."""
        if _user(client) != os.getuid():
            return None
        client.settimeout(_PATIENCE)
        client.sendall(b"+")
        job: dict[str, Any] = json.loads(_read(client, struct.unpack("=I", _read(client, 4))[0]))
        if job["folder"] != self.folder or not self._same(job["environment"]):
            return None
        return job | {"streams": socket.recv_fds(client, 1, 3)[1]}

    def _same(self, environment: dict[str, str]) -> bool:
        """Whether imports see the same variables and files. Processes of stages also have variables that stages set."""
        asked = self.environment
        differ = [key for key in {*asked, *environment} - _OWN if asked.get(key) != environment.get(key)]
        same = all(key not in asked and environment[key] == os.environ.get(key) for key in differ)
        return same and all(os.stat(place).st_mtime_ns == then for place, then in self.installed.items())

    def _fork(self, client: socket.socket, job: dict[str, Any]) -> bool:
        """Fork; returns whether this is the fork. If no process can be added, the client's own runs the job."""
        client.settimeout(None)
        try:
            fork: int | None = os.fork()
        except OSError:
            fork = None
        if fork == 0:
            import ctypes

            ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG: end with the server
            if os.getppid() != self.process:  # it had ended before that call
                os._exit(1)
            for number, stream in enumerate(job["streams"]):
                os.dup2(stream, number)
            for other, _, socket_of_other in self.jobs:
                os.close(other)
                socket_of_other.close()
            self.listening.close()
            os.close(self.owner)
        elif fork is not None:
            self.jobs.append((os.pidfd_open(fork), fork, client))
            with suppress(OSError):  # the client has ended, and so will the fork
                client.sendall(b"+")
        for stream in job["streams"]:
            os.close(stream)
        if not fork:
            client.close()
        return fork == 0

    def _ended(self, fork: int, process: int, client: socket.socket) -> None:
        """Tell the client how its fork has ended; if the client has ended itself, end the fork."""
        self.jobs.remove((fork, process, client))
        with suppress(ProcessLookupError):
            if not select.select([fork], [], [], 0)[0]:
                os.kill(process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        with suppress(OSError):
            client.sendall(struct.pack("=i", code))
        client.close()
        os.close(fork)


def _serve() -> None:
    """Import the packages and serve; returns in a fork that is like the process of its job."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    beginning = json.load(sys.stdin.buffer)
    server = _Server(beginning)
    logging.root.addHandler(logging.NullHandler())  # without a handler there, some packages install one of their own
    server.load()
    job = server.run()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    logging.root.handlers.clear()
    os.environ.clear()
    os.environ.update(job["environment"] | {_SERVER: beginning["name"]})
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    sys.argv[:] = job["arguments"]
    sys.path.insert(0, str(Path(sys.argv[0]).absolute().parent))


if __name__ == "__main__":
    _serve()
    runpy.run_path(sys.argv[0], run_name="__main__")
