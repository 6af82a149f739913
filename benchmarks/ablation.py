"""`python benchmarks/ablation.py`: ablation against one full forward pass for every text and condition.

It uses the default's model, dictionaries, features and conditions (in `data/`: run `make repro` first) and an even
sample of its held-out texts. The straightforward way is that of the paper's code: batches of one text, PyTorch's own
products, nothing skipped, except that it encodes only at hookpoints at which a condition has units. Both must agree to
1e-4 nats/token on each text; if rounding decides which feature is the k-th, with the same products.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import race
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from babelscope import config, sae
from babelscope.ablation import ablate
from babelscope.ablation.conditions import Conditions, conditions
from babelscope.ablation.interventions import FeatureAblation
from babelscope.models import hookpoints, loading, matmul, tokens
from babelscope.sae.autoencoder import SAE

GROUPS = {
    "all hookpoints together": pl.col("hookpoint").is_null() & pl.col("control").is_null(),
    "controls": pl.col("control").is_not_null(),
    "each hookpoint alone": pl.col("hookpoint").is_not_null(),
    "each alone, others' texts": pl.col("hookpoint").is_not_null(),
}
OURS, STRAIGHT = "babelscope", "straightforward"
# Nats/token by which a text may differ.
MOST = 1e-4


def sample(params: config.Config, per_language: int) -> tuple[list[tokens.TokenizedText], list[str]]:
    """Texts of every language at even ranks of length, in `by_length` order, and the language of each."""
    corpus = pl.read_parquet("data/corpus/texts.parquet").filter(split="eval")
    cut = tokens.tokenize(
        loading.load_tokenizer(params.model), corpus["text_id"].to_list(), corpus["text"].to_list(),
        params.corpus.max_tokens,
    )  # fmt: skip
    of = dict(zip(corpus["text_id"], corpus["language"], strict=True))
    chosen = []
    for name in params.languages:
        mine = tokens.by_length([text for text in cut if of[text.text_id] == name])
        ranks = [(2 * i + 1) * len(mine) // (2 * per_language) for i in range(per_language)]
        chosen += [mine[rank] for rank in sorted(set(ranks))]
    ordered = tokens.by_length(chosen)
    return ordered, [of[text.text_id] for text in ordered]


def one_pass(
    model: Any, saes: Mapping[str, SAE], units: Mapping[str, Sequence[int]], text: tokens.TokenizedText
) -> float:
    """NLL of one text (nats) with some units of its features removed."""

    def edit(name: str) -> hookpoints.Edit:
        dictionary = saes[name]
        removed = torch.zeros(dictionary.latents, dtype=torch.bool)
        removed[list(units[name])] = True

        def change(x: Tensor) -> Tensor:
            values, indices = dictionary.encode(x[0, text.special :])
            values = torch.where(removed[indices], values, 0.0)
            part = F.embedding_bag(indices, dictionary.W_dec, per_sample_weights=values, mode="sum")
            return torch.cat([x[:, : text.special], x[:, text.special :] - part], 1)

        return change

    ids = torch.tensor([text.ids])
    with hookpoints.editing(model, {name: edit(name) for name, some in units.items() if some}):
        logits = model(input_ids=ids, use_cache=False).logits[0]
    losses = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    return float(losses[max(text.special - 1, 0) :].double().sum())


@torch.inference_mode()
def straightforward(
    model: Any, saes: Mapping[str, SAE], what: Conditions, texts: Sequence[tokens.TokenizedText], asked: Tensor
) -> Tensor:
    """NLL of every text without and with each condition: nats, float64 `[1 + conditions, texts]`, NaN if not asked."""
    nll = torch.full((1 + len(asked), len(texts)), torch.nan, dtype=torch.float64)
    for at, text in enumerate(texts):
        nll[0, at] = one_pass(model, saes, {}, text)
        for condition in asked[:, at].nonzero().flatten().tolist():
            units = {name: some[condition] for name, some in what.units.items()}
            nll[1 + condition, at] = one_pass(model, saes, units, text)
    return nll


def main() -> None:
    parser = argparse.ArgumentParser(description="Race ablation against one full pass per text and condition.")
    parser.add_argument("--texts", type=int, default=2, help="per language")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    params = config.load()
    texts, language = sample(params, arguments.texts)
    features = pl.read_parquet("data/scores/features.parquet").filter(kind="sae")
    counts = {name: pl.read_parquet(f"data/counts/{name}.parquet") for name in params.hookpoints}
    totals = pl.read_parquet(f"data/counts/{params.hookpoints[0]}.totals.parquet")
    what = conditions(
        features, counts, totals, params.languages, ratio=params.score.ratio, by_layer=True, draws=5, seed=params.seed
    )
    tokens_of = np.array([len(text.ids) - max(text.special, 1) for text in texts])
    every = torch.from_numpy(what.asked(language, tokens_of, params.ablate.others_tokens))
    own = what.keys["ablated"].to_numpy()[:, None] == np.array(language, dtype=object)[None]
    saes = {name: sae.load(Path("data/sae"), name) for name in params.hookpoints}
    fast, plain = (loading.load_model(params.model, "float32") for _ in range(2))
    matmul.use_in(fast)
    done = {name: FeatureAblation(saes[name], units) for name, units in what.units.items()}
    fewest = texts[:2]
    ablate.ablate(fast, done, fewest, 64)
    one_pass(plain, saes, {}, texts[0])

    print(f"{len(texts)} texts, {race.machine()}")
    print(
        f"{'':26}{'passes':>8}{'babelscope':>13}{'straightforward':>17}{'ratio':>8}{'computed':>10}{'difference':>12}"
    )
    records, total = [], {OURS: 0.0, STRAIGHT: 0.0}
    for case, which in GROUPS.items():
        member = torch.tensor(what.keys.select(which.alias("in"))["in"].to_list())
        asked = every & member.unsqueeze(1)
        if case.startswith("each"):
            asked &= torch.from_numpy(own if case == "each hookpoint alone" else ~own)
        results: dict[str, Any] = {}
        runners: dict[str, Callable[[], object]] = {
            OURS: lambda asked=asked, results=results: results.update(
                ours=ablate.ablate(fast, done, texts, params.ablate.batch_tokens, asked=asked)
            ),
            STRAIGHT: lambda asked=asked, results=results: results.update(
                straight=straightforward(plain, saes, what, texts, asked)
            ),
        }
        seconds = race.race(runners, rounds=arguments.rounds, warmup=0)
        ours, straight = results["ours"], results["straight"]
        difference = ((torch.cat([ours.clean[None], ours.ablated]) - straight).abs() / ours.tokens).nan_to_num()
        apart = (difference > MOST).nonzero().tolist()
        for row, at in apart:
            units = {name: some[row - 1] if row else [] for name, some in what.units.items()}
            with torch.inference_mode():
                again = one_pass(fast, saes, units, texts[at])
            mine = ours.ablated[row - 1, at] if row else ours.clean[at]
            difference[row, at] = abs(float(mine) - again) / float(ours.tokens[at])
        worst = float(difference.max())
        passes, ratio = int(asked.sum()) + len(texts), seconds[STRAIGHT] / seconds[OURS]
        print(
            f"{case:26}{passes:8d}{seconds[OURS]:11.1f} s{seconds[STRAIGHT]:15.1f} s{ratio:8.2f}"
            f"{100 * ours.share:8.1f} %{worst:12.1e}{f' ({len(apart)} with the same products)' if apart else ''}",
            flush=True,
        )  # fmt: skip
        if not worst < MOST:
            raise SystemExit(f"{case}: a text differs by {worst:.1e} nats/token")
        records.append(race.record(case, OURS, round(seconds[OURS], 2), "s", ratio_to_best_peer=ratio))
        records.append(race.record(case, STRAIGHT, round(seconds[STRAIGHT], 2), "s"))
        records.append(race.record(case, "largest difference", worst, "nats/token"))
        total = {name: total[name] + seconds[name] for name in total}
    ratio = total[STRAIGHT] / total[OURS]
    print(f"{'the default':34}{total[OURS]:11.1f} s{total[STRAIGHT]:15.1f} s{ratio:8.2f}")
    records.append(race.record("the default", OURS, round(total[OURS], 2), "s", ratio_to_best_peer=ratio))
    records.append(race.record("the default", STRAIGHT, round(total[STRAIGHT], 2), "s"))
    race.write("ablation", records)


if __name__ == "__main__":
    main()
