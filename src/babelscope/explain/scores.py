"""How well an explanation predicts firings: detection and fuzzing (Paulo et al. 2024, arXiv 2410.13928)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from babelscope.core.endpoint import Request, verdicts
from babelscope.explain import prompts

# Texts in one request, and tokens of an answer that is a sentence or a list.
TOGETHER, SENTENCE, LIST = 5, 80, 40
Text = tuple[list[str], list[float]]


class Case(NamedTuple):
    """One feature: its row in `data/scores/features.parquet`, and its texts as (pieces, activations)."""

    row: dict[str, Any]
    examples: list[Text]
    active: list[Text]
    silent: list[Text]

    def question(self) -> Request:
        """The request that asks what makes the feature active."""
        largest = max(value for _, activations in self.examples for value in activations)
        return Request(prompts.explain(self.examples, largest), SENTENCE)


class Trial(NamedTuple):
    """A text as shown to the model, which judges from an explanation whether the feature is active in it."""

    case: int  # the number of the feature's case
    task: str  # prompts.DETECT or prompts.FUZZ
    truth: bool
    text: str


def trials(number: int, case: Case, seed: int) -> list[list[Trial]]:
    """The trials of one case in random order, in groups of `TOGETHER`, each of which is one request."""
    detect = [
        Trial(number, prompts.DETECT, truth, "".join(pieces))
        for truth, texts in ((True, case.active), (False, case.silent))
        for pieces, _ in texts
    ]
    fuzz = []
    for index, (pieces, activations) in enumerate(case.active):
        right = [value > 0 for value in activations]
        wrong = fuzzed(right, [seed, case.row["unit"], index])
        fuzz += [
            Trial(number, prompts.FUZZ, truth, prompts.marked(pieces, on))
            for truth, on in ((True, right), (False, wrong))
        ]
    groups = []
    for of_task in (detect, fuzz):
        # Shuffled, since the true ones are together.
        order = np.random.default_rng([seed, number]).permutation(len(of_task)).tolist()
        groups += [[of_task[i] for i in order[first : first + TOGETHER]] for first in range(0, len(order), TOGETHER)]
    return groups


def judge(group: Sequence[Trial], explanation: str) -> Request:
    """The request about a group of trials."""
    return Request(prompts.judge(group[0].task, explanation, [trial.text for trial in group]), LIST)


def scores(groups: Sequence[Sequence[Trial]], answers: Sequence[str], cases: int) -> list[tuple[Any, ...]]:
    """Detection and fuzzing score of each case, and the number of its trials with a readable answer."""
    results: list[dict[str, list[tuple[bool, bool | None]]]] = [
        {prompts.DETECT: [], prompts.FUZZ: []} for _ in range(cases)
    ]
    for group, answer in zip(groups, answers, strict=True):
        found: Sequence[bool | None] = verdicts(answer, len(group)) or [None] * len(group)
        for trial, verdict in zip(group, found, strict=True):
            results[trial.case][trial.task].append((trial.truth, verdict))
    return [
        (
            *(balanced_accuracy([t for t, _ in pairs], [v for _, v in pairs]) for pairs in by_task.values()),
            sum(verdict is not None for pairs in by_task.values() for _, verdict in pairs),
        )
        for by_task in results
    ]


def balanced_accuracy(truth: Sequence[bool], said: Sequence[bool | None]) -> float | None:
    """The mean of the shares of right answers on true and on false trials, in 0..1 (0.5 by chance).

    An unreadable answer is None and left out. If one of the two kinds has no answer, the result is None.
    """
    shares = []
    for kind in (True, False):
        right = [v is kind for t, v in zip(truth, said, strict=True) if t is kind and v is not None]
        if not right:
            return None
        shares.append(sum(right) / len(right))
    return sum(shares) / 2


def fuzzed(on: Sequence[bool], seed: Sequence[int]) -> list[bool]:
    """As many marks as in `on`, on random pieces that are not marked in `on` (fewer if there are not enough)."""
    free = np.flatnonzero(~np.array(on, dtype=bool))
    result = np.zeros(len(on), dtype=bool)
    result[np.random.default_rng(list(seed)).permutation(free)[: sum(on)]] = True
    return [bool(value) for value in result]
