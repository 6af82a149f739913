"""Does an explanation tell where a feature fires? Detection and fuzzing (Paulo et al. 2024, arXiv 2410.13928)."""

from collections.abc import Sequence

import numpy as np


def balanced_accuracy(truth: Sequence[bool], said: Sequence[bool | None]) -> float | None:
    """The mean of the shares of true and of false ones that were told right, answers that could not be read left out.

    Returns
    -------
    In 0..1, 0.5 by chance; null where one of the two kinds has no answer.
    """
    shares = []
    for kind in (True, False):
        mine = [
            answer is kind
            for is_true, answer in zip(truth, said, strict=True)
            if is_true is kind and answer is not None
        ]
        if not mine:
            return None
        shares.append(sum(mine) / len(mine))
    return sum(shares) / 2


def fuzzed(on: Sequence[bool], seed: Sequence[int]) -> list[bool]:
    """As many marks as in `on`, at random on what is not marked there (on fewer where there is less)."""
    free = np.flatnonzero(~np.array(on, dtype=bool))
    chosen = np.random.default_rng(list(seed)).permutation(free)[: sum(on)]
    result = np.zeros(len(on), dtype=bool)
    result[chosen] = True
    return [bool(value) for value in result]
