"""Whether a repetition gives the same: directions from other texts, and SAEs from other seeds."""

from collections.abc import Mapping, Sequence

import polars as pl
import torch

from babelscope.baselines import directions, selection
from babelscope.baselines.directions import Floats
from babelscope.baselines.selection import ALL, Dictionary
from babelscope.config import Config
from babelscope.features import stability
from babelscope.models import tokens
from babelscope.sae.autoencoder import SAE

REPEATS = {"method": pl.String, "language": pl.String, "cosine": pl.Float64, "agreement": pl.Float64}
REPEATS |= {"matched": pl.Float64}


def repeats(
    every: Sequence[Dictionary], x: Mapping[str, Floats], texts: pl.DataFrame, params: Config, device: torch.device
) -> pl.DataFrame:
    """What a repetition gives: directions fitted on each of two halves of the training texts; SAEs from other seeds.

    `cosine`: of what marks a language with the same after the repetition. For SAEs, that is `sum_u z_u W_dec[u]` over
    the selected units, averaged over the language's training tokens (null for features: stage `stability` has it).
    `agreement`: the share of the language's held-out texts that both identify as the same language. `matched`: of SAEs,
    the share of the language's units whose one-to-one partner has at least the cosine `stability.cosine` with them in
    decoder and encoder (null for features: stage `stability` has it).
    """
    rows: list[tuple[str, str, float | None, float | None, float | None]] = []
    train, held_out = (texts.filter(split=split) for split in ("train", "eval"))
    place_in_language = train.select(pl.col("text_id").rank("ordinal").over("language"))["text_id"]
    halves = [((place_in_language % 2) == half).to_numpy() for half in (0, 1)]
    codes = tokens.codes(train["language"], params.languages).numpy()
    if all(set(codes[half]) == set(codes) for half in halves):
        for name, method in directions.METHODS.items():
            both = [method(x["train"][half], codes[half], len(params.languages)) for half in halves]
            cosines = (both[0].directions * both[1].directions).sum(axis=1)
            found, again = (pl.Series(one.scores(x["eval"]).argmax(axis=1)) for one in both)
            same = alike(found, again, held_out["language"])
            rows += [(name, language, float(c), same.get(language), None)
                     for language, c in zip(params.languages, cosines, strict=True)]  # fmt: skip

    def answers(one: Dictionary, dictionary: SAE, units: pl.DataFrame) -> pl.Series:
        size = params.encode.chunk_tokens
        totals = selection.unit_totals(one.stored, dictionary, one.hookpoint, units, params.languages, size, device)
        return selection.predicted(totals, units, params.languages)

    for one in every:
        if one.sae is None or not one.again:
            continue
        found = answers(one, one.sae, one.units[ALL])
        for other in one.again.values():
            same = alike(found, answers(one, other.sae, other.units), held_out["language"])
            if other.counted is not None:
                cosines = stability.match(*((each.W_dec, each.encoder) for each in (one.sae, other.sae)))
                is_matched = (torch.stack(cosines) >= params.stability.cosine).all(0).cpu().numpy()
            for language in params.languages:
                cosine = matched = None
                if other.counted is not None:
                    first = write(one.sae, one.counted, one.units[ALL], language)
                    second = write(other.sae, other.counted, other.units, language)
                    if first.any() and second.any():
                        cosine = float(torch.nn.functional.cosine_similarity(first, second, dim=0))
                    units = one.units[ALL].filter(language=language)["unit"].to_numpy()
                    matched = float(is_matched[units].mean()) if len(units) else None
                rows.append((one.name, language, cosine, same.get(language), matched))
    table = pl.DataFrame(rows, schema=REPEATS, orient="row")
    return table.group_by("method", "language", maintain_order=True).agg(
        pl.col("cosine", "agreement", "matched").mean()
    )


def alike(first: pl.Series, second: pl.Series, language: pl.Series) -> dict[str, float]:
    """By language, the share of its texts for which two series hold the same."""
    frame = pl.DataFrame({"language": language, "same": (first == second).fill_null(False)})
    return dict(frame.group_by("language").agg(pl.col("same").mean()).iter_rows())


def write(dictionary: SAE, counted: pl.DataFrame, units: pl.DataFrame, language: str) -> torch.Tensor:
    """`sum_u (sum of u's activations) W_dec[u]` over the language's units, float64 `[d]`."""
    sums = counted.filter(language=language).group_by("unit").agg(pl.col("sum").sum())
    sums = sums.join(units.filter(language=language).select("unit"), on="unit").sort("unit")
    rows = dictionary.W_dec.detach().cpu()[sums["unit"].cast(pl.Int64).to_torch()].double()
    return sums["sum"].to_torch() @ rows
