"""How often features fire on versions of the same texts, and the verdict that follows from it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from babelscope.core.progress import Progress
from babelscope.features.examples import Features
from babelscope.models.forward import read_batches
from babelscope.models.tokens import TokenizedTexts

# The rule, fixed before any result was seen. A feature still fires on a version of the texts if its rate there is at
# least this share of its rate on the texts as they are: the default of `score.ratio`, by which SAE-LAPE tells members
# from other languages. A feature is script-bound if it does not still fire on the romanised texts.
STILL = 0.5
# There is a verdict for the features of languages in which romanising replaces at least this share of the letters.
REPLACED = 0.5


class Fired(NamedTuple):
    """How often features fire in each of some texts.

    Attributes
    ----------
    tokens: of each text, int64 `[texts]`.
    fired: by hookpoint, on how many of them each feature fires, float32 `[texts, features]`.
    """

    tokens: Tensor
    fired: dict[str, Tensor]


def nothing(texts: int, features: Mapping[str, Features]) -> Fired:
    """No token of any text."""
    return Fired(
        torch.zeros(texts, dtype=torch.int64), {name: torch.zeros(texts, each.count) for name, each in features.items()}
    )


@torch.no_grad()
def count(
    before: Fired, model: Any, texts: TokenizedTexts, features: Mapping[str, Features], dtype: torch.dtype,
    batch_tokens: int,
) -> Fired:  # fmt: skip
    """`before` with the texts `texts.frame["index"]` counted anew, by a forward pass.

    `features`: by hookpoint. `dtype`: what activations are rounded to. `batch_tokens`: tokens in one forward pass.
    """
    number = texts.frame["index"].cast(pl.Int64).to_torch()
    found = Fired(before.tokens.clone(), {name: table.clone() for name, table in before.fired.items()})
    found.tokens[number] = texts.lengths
    for table in found.fired.values():
        table[number] = 0
    by_input = {each.reads(name): name for name, each in features.items()}
    with Progress("script", int(texts.lengths.sum()), "tokens") as progress:
        for activations, text in read_batches(model, texts, texts.batches(batch_tokens), list(by_input), dtype):
            for name, x in activations.items():
                fires = features[by_input[name]].activations(x) > 0
                found.fired[by_input[name]].index_add_(0, number[text], fires.float().cpu())
            progress.update(len(text))
    return found


def rates(fired: Tensor, tokens: Tensor, texts: Tensor, owns: Tensor) -> Tensor:
    """The share of tokens of a feature's language on which it fires: float64 `[features]`; nan without tokens.

    `fired`: tokens by text and feature, `[texts, features]`. `tokens`: of each text, `[texts]`. `texts`: language
    code of each text, int64 `[texts]`. `owns`: language code of each feature, int64 `[features]`.
    """
    is_own = (texts.unsqueeze(1) == owns).double()
    return (fired.double() * is_own).sum(0) / (tokens.double().unsqueeze(1) * is_own).sum(0)


def judged(frame: pl.DataFrame, replaced: Mapping[str, float]) -> pl.DataFrame:
    """`frame` with the verdicts (see `STILL`).

    Parameters
    ----------
    frame: `language`, and the rates `original`, `romanised`, `shuffled`, one row per feature and language.
    replaced: by language, the share of its letters that romanising replaces.

    Returns
    -------
    The frame with `kept_romanised` and `kept_shuffled`, rates relative to `original` (null: the feature fires on none
    of these texts), and `script_bound` (null: no verdict, as romanising hardly changes the language's texts).
    """
    kept = {
        f"kept_{name}": pl.when(pl.col("original") > 0).then(pl.col(name) / pl.col("original"))
        for name in ("romanised", "shuffled")
    }
    tested = [name for name, share in replaced.items() if share >= REPLACED]
    verdict = pl.when(pl.col("language").is_in(tested)).then(pl.col("kept_romanised") < STILL)
    return frame.with_columns(**kept).with_columns(script_bound=verdict)
