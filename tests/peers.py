"""Code that runs in a peer's own environment, and what it found against what we find."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from babelscope.sae.checkpoint import load


def in_its_environment(peer: str, code: str, folder: Path, theirs: Any) -> dict[str, torch.Tensor]:
    python = Path(__file__).parents[1] / ".bench" / peer / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment of {peer}: `make .bench/{peer}/.ready` sets it up")
    draw = torch.Generator().manual_seed(1)
    save_file({str(d): torch.randn(50, d, generator=draw) for d in (16, 24)}, folder / "x.safetensors")
    # Our own package is not to be seen there, and nothing is to be looked up on the net or kept at home.
    hidden = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "CUDA_VISIBLE_DEVICES": "", "SPARSIFY_DISABLE_TRITON": "1"}
    command = [str(python), "-c", code, str(folder), json.dumps(theirs)]
    done = subprocess.run(command, cwd=folder, env=hidden | quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "results.safetensors")


def assert_alike(
    folder: Path, whose: str, name: str, results: dict[str, torch.Tensor], place: str | None = None
) -> None:
    """Loaded from the same files by us, it encodes and decodes to what the peer found, to 1e-5 of the largest value."""
    sae = load(folder / whose / (place or name))
    x = load_file(folder / "x.safetensors")[str(sae.d_in)]
    values, indices = sae.encode(x)
    z, y = (results[f"{whose}.{name}.{what}"] for what in ("z", "y"))
    assert int((z > 0).sum()) > 50
    ours = torch.zeros_like(z).scatter_add(1, indices, values), sae.reconstruct(x, values, indices)
    for mine, found in zip(ours, (z, y), strict=True):
        torch.testing.assert_close(mine, found, rtol=0.0, atol=1e-5 * float(found.abs().max()))
