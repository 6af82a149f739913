"""Controls in two steps: two draws for every language, and the others where these two do not decide."""

from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
from torch import Tensor

from babelscope.ablation.ablate import TextNLL
from babelscope.ablation.conditions import Conditions
from babelscope.ablation.selectivity import against_control
from babelscope.models.tokens import TokenizedText

# Draws after which a language's comparison with its controls may end.
FIRST = 2

# Measures conditions on texts: the pairs in a bool `[conditions, texts]`, resuming from what is in a folder.
Measure = Callable[[Conditions, list[TokenizedText], Tensor, Path], TextNLL]


def measure(
    what: Conditions,
    texts: Sequence[TokenizedText],
    language: Sequence[str],
    asked: Tensor,
    run: Measure,
    keep: Path,
    *,
    resamples: int,
    seed: int,
) -> tuple[TextNLL, Conditions]:
    """Measure everything but the later draws; then these, for the languages that `FIRST` draws do not decide.

    A language needs no further draws if both differences to its controls lie more than `selectivity.EARLY` standard
    deviations from 0 (the rule of Haybittle and Peto).

    Parameters
    ----------
    what: all conditions.
    texts: in `by_length` order.
    language: of each text.
    asked: bool `[conditions, texts]`, see `Conditions.asked`.
    run: measures some of the conditions.
    keep: folder in which an interrupted run leaves what it has done.
    resamples, seed: of the bootstrap.

    Returns
    -------
    The NLLs, and the conditions that were measured.
    """
    is_later = pl.col("control").fill_null(0) >= FIRST
    first = what.only(~is_later)
    nll = run(first, list(texts), asked[what.numbers(~is_later)], keep / "first")
    keys = first.keys.filter(pl.col("hookpoint").is_null())
    names = keys["ablated"].unique(maintain_order=True).to_list()
    change = (nll.ablated - nll.clean).numpy()
    found = against_control(change, nll.tokens.numpy(), language, keys, names, resamples, seed)
    undecided = found.filter(~pl.col("decided"))["language"].to_list()
    is_left = is_later & pl.col("ablated").is_in(undecided)
    left = what.only(is_left)
    if left.keys.is_empty():
        return nll, first
    pairs = asked[what.numbers(is_left)]
    numbers = pairs.any(0).nonzero().squeeze(1)
    more = run(left, [texts[number] for number in numbers.tolist()], pairs[:, numbers], keep / "later")
    return nll.followed_by(more, numbers), what.only(~is_later, is_left)
