"""Two processes extract what one does, to the byte: started by Lightning itself, and by SLURM's `srun` on two nodes."""

import os
from pathlib import Path
from typing import Any

import pytest
import test_activations as one
import torch
import transformers
import warm
from slurm import two_nodes
from torch.distributed.tensor import DTensor

from babelscope.activations import extraction, store
from babelscope.core.errors import UserError

NAMES = ["layers.0.mlp", "layers.1"]
SCRIPT = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_extraction_distributed import extract

if __name__ == "__main__":
    first = extract(Path(sys.argv[1]), devices=int(sys.argv[2]), num_nodes=int(sys.argv[3]), strategy=sys.argv[4])
    Path(f"{{sys.argv[1]}}.{{first}}").touch()
"""


def extract(folder: Path, **hardware: Any) -> bool:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    # Three shards: the processes have unlike numbers of them, and of batches.
    texts = one.corpus()
    shards = extraction.plan(texts, batch_tokens=64, shard_rows=120)
    assert len(shards) == 3
    first = extraction.extract(model, texts, shards, NAMES, folder, "int8", one.HARDWARE.model_copy(update=hardware))
    in_pieces = [isinstance(weight, DTensor) for weight in model.model.layers[0].parameters()]
    assert all(in_pieces) if hardware.get("strategy") == "fsdp" else not any(in_pieces)
    return first


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder, threads = tmp_path_factory.mktemp("one"), torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have: the number of threads decides how sums are rounded
    assert extract(folder)
    torch.set_num_threads(threads)
    return files(folder)


def start(tmp_path: Path, devices: int, nodes: int, strategy: str = "ddp", **environment: str) -> warm.Process:
    script = tmp_path / "extract.py"
    script.write_text(SCRIPT)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(extraction.__file__).parents[2])}
    command = [str(script), str(tmp_path / "two"), str(devices), str(nodes), strategy]
    said = tmp_path / f"said-{environment.get('SLURM_PROCID', 0)}.txt"
    said.touch()
    return warm.Process(command, tmp_path, kept | environment, said)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_devices_write_the_bytes_of_one(tmp_path: Path, expected: dict[str, bytes], strategy: str) -> None:
    process = start(tmp_path, 2, 1, strategy)
    assert process.wait(timeout=300) == 0, process.out.read_text()
    assert files(tmp_path / "two") == expected and len(expected) == 3 * len(NAMES)
    assert (tmp_path / "two.True").exists() and (tmp_path / "two.False").exists()


def test_two_nodes_of_slurm_write_the_bytes_of_one(tmp_path: Path, expected: dict[str, bytes]) -> None:
    processes = [start(tmp_path, 1, 2, **job) for job in two_nodes()]
    ends = [process.wait(timeout=300) for process in processes]
    assert ends == [0, 0], [process.out.read_text() for process in processes]
    assert files(tmp_path / "two") == expected


def test_nodes_that_do_not_share_their_folder_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "write_shard", lambda *_, **__: None)
    with pytest.raises(UserError, match="shards of other processes are missing; all nodes must share"):
        extract(tmp_path)
