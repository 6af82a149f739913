"""What git says of a repository."""

import subprocess
from pathlib import Path


def git(folder: Path, *arguments: str) -> str | None:
    """What git prints for a command in `folder`; None if it fails, or there is no git."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
