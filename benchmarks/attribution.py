"""`python benchmarks/attribution.py`: the estimated effect of single features against true ablations.

It uses the default's model, dictionaries and features (in `data/`: run `make repro` first). The estimate is that of
`ablate.rank_tokens`: one backward pass over training texts, with half of the features removed. The truth is the change
of the NLL of the same texts of the feature's language when the feature alone is removed, for features at even ranks of
the estimate.
"""

import argparse

import numpy as np
import polars as pl
import race
import torch

from babelscope import config, sae
from babelscope.ablation.ablate import ablate
from babelscope.ablation.interventions import FeatureAblation
from babelscope.ablation.run import rank
from babelscope.models import hardware, loading, matmul
from babelscope.models.tokens import texts_of


def main() -> None:
    """Print the figures and write them to benchmarks/results/attribution.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=60, help="training tokens per language")
    parser.add_argument("--features", type=int, default=12, help="features per language")
    parser.add_argument("--languages", nargs="*", help="default: all")
    arguments = parser.parse_args()
    params = config.load()
    hardware.prepare(params.hardware)
    languages = arguments.languages or params.languages
    corpus = pl.read_parquet("data/corpus/texts.parquet").filter(pl.col("language").is_in(languages), split="train")
    tokenizer = loading.load_tokenizer(params.model)
    texts, language = texts_of(corpus, tokenizer, arguments.tokens, params.corpus.max_tokens)
    saes = {name: sae.load("data/sae", name) for name in params.hookpoints}
    model = loading.load_model(params.model, params.ablate.dtype)
    matmul.use_in(model)

    features = pl.read_parquet("data/scores/features.parquet")
    features = features.filter(pl.col("language").is_in(languages), kind="sae")
    ranks = rank(model, saes, features, texts, language, languages, params.ablate.batch_tokens)
    every = pl.col("causal_rank") * arguments.features // pl.len()
    chosen = ranks.filter((every != every.shift(1, fill_value=-1)).over("language")).sort("hookpoint", "unit")

    sets = {
        name: [[unit] if at == name else [] for at, unit in chosen.select("hookpoint", "unit").iter_rows()]
        for name in saes
    }  # fmt: skip
    asked = torch.tensor([[own == name for name in language] for own in chosen["language"]])
    made = {name: FeatureAblation(saes[name], units) for name, units in sets.items()}
    nll = ablate(model, made, texts, params.ablate.batch_tokens, asked=asked)
    change = (nll.ablated - nll.clean).where(asked, 0.0).sum(1) / (asked * nll.tokens).sum(1)
    found = chosen.with_columns(pl.Series("true", change.numpy()))
    within = found.group_by("language", maintain_order=True).agg(pl.corr("own", "true", method="spearman").alias("rho"))
    case = f"{len(found)} features, {len(languages)} languages, {arguments.tokens} training tokens each"
    figures = {
        "rank correlation of estimate and ablation": found.select(pl.corr("own", "true", method="spearman")).item(),
        "the same within a language, mean": within["rho"].mean(),
        "the same within a language, least": within["rho"].min(),
        "rank correlation of entropy and ablation": found.select(pl.corr("entropy", "true", method="spearman")).item(),
        "slope of ablation over estimate": float(np.polyfit(found["own"].to_numpy(), found["true"].to_numpy(), 1)[0]),
    }
    for name, value in figures.items():
        print(f"{name}: {value:.3f}")
    race.write("attribution", [race.record(case, name, value, "") for name, value in figures.items()])


if __name__ == "__main__":
    main()
