"""Checkpoints in a file, or in a part per process if the processes train different SAEs; any number of devices resume.

Part 0 is the checkpoint's own file, which is written last. It says how many parts of which step belong to it, so that
a kill at any moment leaves a complete checkpoint.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from babelscope.core.files import write_atomically
from babelscope.models.processes import rank, together
from babelscope.sae.training.trainer import pl

Checkpoint = dict[str, Any]


class AtomicCheckpointIO(pl.plugins.TorchCheckpointIO):  # type: ignore[misc]
    """Writes checkpoints atomically; a full disk raises a UserError.

    Parameters
    ----------
    parts: number of processes that train different SAEs, each of which writes and reads its part; 1: all SAEs are in
        every process, and Lightning lets the first write.
    device: see `models.processes.together`.
    """

    def __init__(self, parts: int = 1, device: torch.device | None = None) -> None:
        self.parts, self.device = parts, device

    def save_checkpoint(self, checkpoint: Checkpoint, path: Any, storage_options: Any = None) -> None:
        """Write the file or, of several processes, this one's part."""
        path, step, content = Path(path), checkpoint["global_step"], checkpoint | {"parts": self.parts}
        number = rank() if self.parts > 1 else 0
        target = _part(path, step, number)

        def write() -> None:
            write_atomically(target, lambda temporary: torch.save(content, temporary))

        if self.parts > 1:
            together(write if number else lambda: None, self.device)
        if number:
            return
        write()
        for old in path.parent.glob(f"{path.stem}-*-*{path.suffix}"):
            if not old.stem.startswith(f"{path.stem}-{step}-"):
                old.unlink()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Checkpoint:
        """The checkpoint of the SAEs that this process trains."""
        return _of_process(read_parts(Path(path)), rank() if self.parts > 1 else 0, self.parts)


def read_parts(path: Path) -> list[Checkpoint]:
    """All parts of a checkpoint; their tensors are read from the disk when they are used.

    Raises
    ------
    RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError: a file is missing or damaged.
    """
    first = _read(path)
    parts = first.get("parts", 1) if isinstance(first, dict) else 1
    return [first, *(_read(_part(path, first["global_step"], number)) for number in range(1, parts))]


def _read(path: Path) -> Checkpoint:
    return torch.load(path, weights_only=True, map_location="cpu", mmap=True)  # type: ignore[no-any-return]


def _part(path: Path, step: int, number: int) -> Path:
    return path.with_name(f"{path.stem}-{step}-{number}{path.suffix}") if number else path


def _of_process(parts: Iterable[Checkpoint], number: int, processes: int) -> Checkpoint:
    """The parts as one checkpoint of the SAEs of process `number`."""
    parts = list(parts)
    weights: dict[int, dict[str, Any]] = {}
    moments: dict[int, list[Any]] = {}
    for part in parts:
        own = list(part["histories"])
        moments |= dict(zip(own, _moments(part["optimizer_states"][0], len(own)), strict=True))
        for learner in own:
            start = f"learners.{learner}."
            weights[learner] = {name: x for name, x in part["state_dict"].items() if name.startswith(start)}
    wanted = sorted(weights)[number::processes]
    joined = {
        name: {learner: part[name][learner] for learner in wanted for part in parts if learner in part[name]}
        for name in ("histories", "normalisations")
    }
    # `clone`: without it, the weights in training would be pages of the file.
    state = {name: x.clone() for learner in wanted for name, x in weights[learner].items()}
    optimizer = _joined(parts[0]["optimizer_states"][0], [moments[learner] for learner in wanted])
    return parts[0] | joined | {"state_dict": state, "optimizer_states": [optimizer]}


def _moments(optimizer: Mapping[str, Any], learners: int) -> list[list[Any]]:
    """For every learner, Adam's state of its encoder and of its other weights (see `configure_optimizers`)."""
    encoders, others = (
        [optimizer["state"][number] for number in group["params"]] for group in optimizer["param_groups"]
    )
    each = len(others) // learners
    return [[encoders[place], *others[place * each :][:each]] for place in range(learners)]


def _joined(optimizer: Mapping[str, Any], learners: list[list[Any]]) -> dict[str, Any]:
    """The state of an optimizer for these learners, with the settings of `optimizer`."""
    states = [states[0] for states in learners] + [state for states in learners for state in states[1:]]
    numbers = range(len(states))
    first, second = optimizer["param_groups"]
    groups = [
        {**first, "params": list(numbers[: len(learners)])}, {**second, "params": list(numbers[len(learners) :])}
    ]  # fmt: skip
    copies = [{name: x.clone() for name, x in state.items()} for state in states]
    return {"state": dict(enumerate(copies)), "param_groups": groups}
