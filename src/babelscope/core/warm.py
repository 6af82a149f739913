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
_OWN = {"BABELSCOPE_AHEAD", _SERVER, "DVC_STAGE", "TQDM_DISABLE"}
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
        socket.send_fds(server, [struct.pack("=I", len(content))], [0, 1, 2])
        server.sendall(content)
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
    with suppress(OSError):
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=nothing, stderr=nothing)
        assert server.stdin is not None
        with server.stdin as stream:
            stream.write(json.dumps(beginning).encode())


def _name() -> str | None:
    """The name of the server's socket, one for each process of DVC; None if there can be no server."""
    if sys.platform != "linux" or "DVC_ROOT" not in os.environ or "torch" in sys.modules:
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
        self.owner = os.pidfd_open(beginning["owner"])
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listening.bind(f"\0{beginning['name']}")  # fails if there is a server already
        self.listening.listen()
        self.jobs: list[tuple[int, int, socket.socket]] = []  # a fork's descriptor and id, and its client

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
                found = None
                with suppress(OSError, ValueError, struct.error):
                    found = self._asked(client)
                if found is None:
                    client.close()
                elif self._fork(client, found):
                    return found

    def _asked(self, client: socket.socket) -> dict[str, Any] | None:
        """The job of a client, with its streams; None if its own process has to run it."""
        if _user(client) != os.getuid():
            return None
        client.settimeout(_PATIENCE)
        client.sendall(b"+")
        head, streams, _, _ = socket.recv_fds(client, 4, 3)
        job: dict[str, Any] = json.loads(_read(client, struct.unpack("=I", head)[0]))
        if job["folder"] == self.folder and self._same(job["environment"]):
            return job | {"streams": streams}
        for stream in streams:
            os.close(stream)
        return None

    def _same(self, environment: dict[str, str]) -> bool:
        """Whether imports see the same variables. A process that a stage has started also has those that stages set."""
        asked = self.environment
        differ = [key for key in {*asked, *environment} - _OWN if asked.get(key) != environment.get(key)]
        return all(key not in asked and environment[key] == os.environ.get(key) for key in differ)

    def _fork(self, client: socket.socket, job: dict[str, Any]) -> bool:
        """Fork; returns whether this is the fork."""
        client.settimeout(None)
        process = os.fork()
        if process:
            for stream in job["streams"]:
                os.close(stream)
            self.jobs.append((os.pidfd_open(process), process, client))
            client.sendall(b"+")
            return False
        import ctypes

        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG: end with the server
        for number, stream in enumerate(job["streams"]):
            os.dup2(stream, number)
            os.close(stream)
        for fork, _, other in self.jobs:
            os.close(fork)
            other.close()
        client.close()
        self.listening.close()
        os.close(self.owner)
        return True

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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    beginning = json.load(sys.stdin.buffer)
    server = _Server(beginning)
    logging.root.addHandler(logging.NullHandler())  # without a handler there, some packages install one of their own
    for package in _PACKAGES:
        with suppress(ImportError):
            import_module(package)
    if threading.active_count() > 1:
        sys.exit()  # a fork would lack the other threads
    gc.freeze()
    job = server.run()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.root.handlers.clear()
    os.environ.clear()
    os.environ.update(job["environment"] | {_SERVER: beginning["name"]})
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)  # noqa: SIM115
    sys.argv[:] = job["arguments"]
    sys.path.insert(0, str(Path(sys.argv[0]).absolute().parent))


if __name__ == "__main__":
    _serve()
    runpy.run_path(sys.argv[0], run_name="__main__")
