"""`python tools/full_disk.py`: fill the disk up in every stage (as root on Linux: it mounts and resizes a tmpfs).

An undisturbed run shows how much a stage writes. Then each stage runs twice in a second clone on a tmpfs. With too
little room, it must end with one message that names the file, and leave no half-written file. With enough room, it must
write the same files as the undisturbed run.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from clone import clone, environment, run
from kills import OUTPUTS, digests
from ruamel.yaml import YAML

ROOM = 2**31


def written(repo: Path, stage: str) -> int:
    """Bytes that `stage` has written."""
    outs = YAML(typ="safe").load((repo / "dvc.lock").read_text())["stages"][stage].get("outs", [])
    return sum(out["size"] for out in outs)


def resize(place: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


def squeeze(calm: Path, tight: Path, stages: list[str], share: float) -> None:
    """Run `stages` one after the other, each with too little room first."""
    whole = digests(calm)
    for stage in stages:
        name, _, hookpoint = stage.partition("@")
        command = [sys.executable, f"stages/{name}.py", *([hookpoint] if hookpoint else [])]
        disk = os.statvfs(tight)
        used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        resize(tight, used + int(share * written(calm, stage)))
        done = subprocess.run(command, cwd=tight, env=environment(), capture_output=True, text=True, check=False)
        said = (done.stdout + done.stderr).strip().splitlines()
        print(f"{stage:28s} exit {done.returncode}  {said[-1] if said else ''}")
        resize(tight, ROOM)
        assert not any("Traceback" in line for line in said), "\n".join(said)
        if done.returncode:
            assert done.returncode == 1 and sum(line.startswith("error: ") for line in said) == 1, said
            assert "o space left" in said[-1] or "is the disk full" in said[-1], said
        broken = {file for file, digest in digests(tight).items() if whole.get(file) != digest}
        assert not broken, f"half-written: {sorted(broken)}"
        run(tight, *command)
    assert digests(tight) == whole
    left = [path for folder in OUTPUTS for path in (tight / folder).rglob("*.tmp")]
    assert not left, left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--share", type=float, default=0.5, help="of what a stage writes there is room for")
    parser.add_argument("--calm", type=Path, help="a clone with small params, its pipeline run; default: one is made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        calm, tight = arguments.calm or Path(temporary) / "calm", Path(temporary) / "tight"
        if arguments.calm is None:
            calm.mkdir()
            clone(calm)
            run(calm, "dvc", "repro")
        tight.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "babelscope", str(tight)], check=True)
        try:
            shutil.copytree(calm, tight, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".dvc", *OUTPUTS, "mlflow*"))
            (tight / ".dvc").mkdir()
            names = run(calm, "dvc", "stage", "list", "--name-only").split()
            squeeze(calm, tight, [name for name in names if name != "track"], arguments.share)
        finally:
            subprocess.run(["umount", "-l", str(tight)], check=True)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    main()
