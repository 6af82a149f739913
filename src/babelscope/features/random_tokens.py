"""Random tokens as a pseudo-language that owns nothing (LangFIR, arXiv 2604.03532).

A latent that fires on sequences of random tokens as often as on its language does not tell the language from others.
"""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from babelscope import sae
from babelscope.config import Config
from babelscope.core.files import read_table
from babelscope.core.paths import Paths
from babelscope.features import rates
from babelscope.features.count import count
from babelscope.models import hardware, loading, tokens

NAME = "random"


def firing(params: Config, paths: Paths, saes: Path, hookpoints: Sequence[str]) -> pl.DataFrame:
    """The share of `score.random_tokens` random tokens on which the latents of the SAEs in `saes` fire.

    The sequences are as long as the corpus's texts on average.

    Returns
    -------
    `hookpoint`, `layer`, `unit`, `rate` (above 0).
    """
    device = hardware.prepare(params.hardware)
    totals = read_table(paths.totals(hookpoints[0]))
    length = max(1, round(int(totals["tokens"].sum()) / int(totals["texts"].sum())))
    model = loading.load_model(params.model, params.extract.dtype).to(device)
    embeddings = model.get_input_embeddings().weight.shape[0]
    tokenizer = loading.load_tokenizer(params.model)
    texts = tokens.random_texts(tokenizer, embeddings, params.score.random_tokens, length, params.seed)
    frame = texts.frame.with_columns(language=pl.lit(NAME), split=pl.lit("train"))
    found = count(
        model, tokens.TokenizedTexts(frame, texts.special),
        {name: sae.load(saes, name).to(device) for name in hookpoints}, [NAME],
        dtype=loading.DTYPES[params.extract.store_dtype], batch_tokens=params.extract.batch_tokens,
        chunk_tokens=params.encode.chunk_tokens,
    )  # fmt: skip
    return pl.concat([
        counted.counts.select(
            pl.lit(name).alias("hookpoint"), "layer", "unit", rate=pl.col("tokens") / counted.totals["tokens"].item()
        )
        for name, counted in found.items()
    ])  # fmt: skip


def without(counts: rates.Counts, totals: pl.DataFrame, random: pl.DataFrame, ratio: float) -> pl.LazyFrame:
    """`counts` without the units to which random tokens belong as a language belongs: `rate >= ratio * max_l P(l, u)`.

    Parameters
    ----------
    counts, totals: as for `sae_lape`, `counts` with `hookpoint`.
    random: see `firing`.
    ratio: as for `sae_lape`.
    """
    key = rates.unit_key(counts)
    size = totals.lazy().select("language", pl.col("tokens").alias("_tokens"))
    probability = pl.col("tokens") / pl.col("_tokens")
    peaks = counts.lazy().join(size, on="language").group_by(key).agg(peak=probability.max())
    alike = peaks.join(random.lazy(), on=key).filter(pl.col("rate") >= ratio * pl.col("peak"))
    return counts.lazy().join(alike, on=key, how="anti", maintain_order="left")
