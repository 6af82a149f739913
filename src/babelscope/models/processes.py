"""The processes of a run on several devices: work that succeeds on all of them or fails on all."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import distributed

from babelscope.core.errors import UserError

Result = TypeVar("Result")


def rank() -> int:
    """The number of this process in the run; 0 if there is only one."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def together(work: Callable[[], Result], device: torch.device | None = None) -> Result:
    """The result of `work`, once the work of all processes has succeeded; every process must call this.

    A process that raised an exception alone would leave the others waiting for it.

    Parameters
    ----------
    device: the device of this process, if the processes communicate by NCCL; default: the CPU.

    Raises
    ------
    UserError: the work of another process has failed; the message names the process and its reason. Or another process
        has ended. An exception of this process is raised as it is.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return work()
    result: list[Result] = []
    failure: Exception | None = None
    try:
        result.append(work())
    except Exception as error:
        failure = error
    reasons: list[str | None] = [None] * distributed.get_world_size()
    try:
        failed = torch.tensor([failure is not None], dtype=torch.int32, device=device)
        distributed.all_reduce(failed, distributed.ReduceOp.MAX)
        if not failed.item():
            return result[0]
        distributed.all_gather_object(reasons, failure and (str(failure) or type(failure).__name__))
    except RuntimeError as error:
        if failure is None:
            raise UserError(
                "another process of the run has ended; its own message, if it has one, says why (it has none if the "
                f"system has killed it, for example for its memory): {' '.join(str(error).split())[:200]}"
            ) from None
    if failure is not None:
        raise failure
    number, reason = next((number, reason) for number, reason in enumerate(reasons) if reason)
    raise UserError(f"process {number} of {len(reasons)} has failed: {reason}")
