"""Resuming after a kill: a stage keeps finished parts in a scratch folder, and its next run reads them."""

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from babelscope.core import fingerprint
from babelscope.core.files import write_atomically
from babelscope.core.progress import Progress

if TYPE_CHECKING:  # torch takes seconds to import, and not every stage needs it
    from torch import Tensor

log = logging.getLogger(__name__)

# The rank of a process in a distributed run (torchrun, Lightning, SLURM, LSF); 0 in the first process.
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")

Batch = TypeVar("Batch", bound=Sequence[Any])


class _Work:
    """The stage that this process runs (see `stage.alone`), whether it holds the stage's lock, and a folder to keep."""

    name = ""
    is_alone = False
    keep: Path | None = None


work = _Work()


def parts(
    title: str,
    batches: Sequence[Batch],
    compute: Callable[[Batch], "Mapping[str, Tensor]"],
    folder: Path | None,
    *,
    size: Callable[[Batch], int] = len,
    unit: str = "texts",
) -> "Iterator[Mapping[str, Tensor]]":
    """Yield `compute(batch)` for every batch, in order. Batches that an earlier run has computed are read instead.

    Parameters
    ----------
    title: shown with the progress.
    batches: must be the same in every run with the same `folder`.
    compute: returns contiguous tensors on the CPU.
    folder: keeps the results, see `kept`; None: they are not kept.
    size, unit: the amount of work in a batch, for the progress.
    """
    with Progress(title, sum(map(size, batches)), unit) as progress:
        for number, batch in enumerate(batches):
            path = None if folder is None else folder / f"part-{number:06d}.safetensors"
            part: Mapping[str, Tensor] | None = None if path is None else read_part(path)
            if part is not None:
                progress.skip(size(batch))
            else:
                part = compute(batch)
                if path is not None:
                    write_part(path, part)
                progress.update(size(batch))
            yield part


def write_part(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Write tensors as a safetensors file, atomically."""
    from safetensors.torch import save_file

    write_atomically(path, partial(save_file, dict(tensors)))


def read_part(path: Path) -> "dict[str, Tensor] | None":
    """The tensors that an interrupted run has written; None if the file does not exist or is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        return None
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except (OSError, SafetensorError) as error:
        log.warning("%s: damaged, computed again (%s)", path, error)
        return None


def is_first_rank() -> bool:
    """Whether this process is the first of a distributed run, or the only one."""
    return all(os.environ.get(rank, "0") == "0" for rank in RANKS)


@contextmanager
def kept(stage: str, params: Mapping[str, Any], inputs: Iterable[Path]) -> Iterator[Path]:
    """The scratch folder of a stage (see `scratch`); it is deleted if the block ends without an exception.

    Parameters
    ----------
    stage, params: see `fingerprint.fingerprint`.
    inputs: the files and folders that the stage reads.
    """
    hashes = {str(path): fingerprint.dvc_md5(path) for path in inputs}
    folder = scratch(fingerprint.fingerprint(stage, params, hashes))
    yield folder
    if is_first_rank():  # the others may end earlier
        shutil.rmtree(folder, ignore_errors=True)


def scratch(name: str) -> Path:
    """The folder in which a stage keeps the parts from which it resumes after a kill.

    `name` is the fingerprint of the stage's params and inputs, so that a run never resumes the work of another.
    Folders that runs of the same stage with other params, inputs or code have left are deleted (see `prune`).
    """
    folder = scratch_root() / (f"{work.name}.{name}" if work.name else name)
    prune(keep=folder)
    return folder


def scratch_root() -> Path:
    """The folder of all scratch folders; temporary copies of the repository use that of the main checkout."""
    return Path(os.environ.get("DVC_ROOT", ".")) / ".scratch"


def prune(keep: Path | None = None) -> None:
    """Delete the scratch folders of this process's stage except `keep` and `work.keep`.

    It does nothing without the stage's lock.

    A killed run cannot delete its own folder, which may hold terabytes. The lock proves that no live process uses it.
    """
    if not work.is_alone:
        return
    for folder in scratch_root().glob("*.*"):
        if folder.name.rpartition(".")[0] == work.name and folder not in (keep, work.keep):
            log.info("%s: deleted, a run with other params, inputs or code left it", folder)
            shutil.rmtree(folder, ignore_errors=True)
