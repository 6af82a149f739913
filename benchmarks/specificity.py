"""`python benchmarks/specificity.py`: choose `score.max_entropy` of the default.

The rule: the loosest limit of LIMITS at which the median of the features' effective languages (`exp(H)`) is at most 2
and no run with shuffled labels selects a feature. Such a run deals the languages out to the training texts at random.
The rule uses no result of ablation or identification.
"""

import math

import numpy as np
import polars as pl
import race
import torch

from babelscope import config
from babelscope.activations.store import ActivationStore
from babelscope.core.paths import Paths
from babelscope.features import sae_lape
from babelscope.features.counter import Counter, whole_texts
from babelscope.models.names import layer_of
from babelscope.sae import checkpoint

LIMITS = [math.inf, 10, 8, 7, 6, 5, 4.5, 4, 3.5, 3, 2.5, 2]  # effective languages
SHUFFLES, MEDIAN = 3, 2.0


def main() -> None:
    params, paths = config.load(), Paths()
    names, table = params.languages, pl.read_parquet(paths.tokens).filter(split="train")
    text = table["text_id"].rle_id().cast(pl.Int64).to_torch()
    language = table["language"].cast(pl.Enum(names)).to_physical().cast(pl.Int64).to_torch()
    first = torch.as_tensor(np.unique(text.numpy(), return_index=True)[1])
    by_text, draw = language[first], torch.Generator().manual_seed(params.seed)
    labels = [language, *(by_text[torch.randperm(len(by_text), generator=draw)][text] for _ in range(SHUFFLES))]
    frames: list[list[pl.DataFrame]] = [[] for _ in labels]
    for hookpoint in params.hookpoints:
        sae, store = checkpoint.load(paths.saes, hookpoint), ActivationStore(paths.activations / hookpoint)
        counters, rows = [Counter(names, sae.latents) for _ in labels], table["row"].to_torch()
        for start, end in whole_texts(text, params.encode.chunk_tokens):
            values, indices = sae.encode(store.gather(rows[start:end]))
            for counter, code in zip(counters, labels, strict=True):
                counter.add(values, indices, code[start:end], text[start:end])
        for frame, counter in zip(frames, counters, strict=True):
            frame.append(counter.frame(layer_of(hookpoint)))
    found = []
    for code, parts in zip(labels, frames, strict=True):
        rows = pl.DataFrame({"code": code.numpy(), "text": text.numpy()})
        totals = rows.group_by("code").agg(tokens=pl.len(), texts=pl.col("text").n_unique()).sort("code")
        totals = totals.with_columns(language=pl.Series([names[i] for i in totals["code"]])).drop("code")
        settings = params.score.selection | {"max_entropy": None}
        found.append(sae_lape(pl.concat(parts), totals, **settings))
    records, chosen = [], None
    for limit in LIMITS:
        kept = [frame.filter(pl.col("entropy").exp() <= limit) for frame in found]
        real, shuffled = kept[0], sum(frame.height for frame in kept[1:])
        median = float(real["entropy"].exp().median())  # type: ignore[arg-type]
        case = f"at most {limit:g} effective languages" if math.isfinite(limit) else "no limit"
        values = {"features": real.height, "languages": real["language"].n_unique(), "median": round(median, 3),
                  f"features of {SHUFFLES} runs with shuffled labels": shuffled}  # fmt: skip
        print(f"{case}: " + ", ".join(f"{name} {value}" for name, value in values.items()), flush=True)
        records += [race.record(case, name, value, "features" if name != "median" else "languages")
                    for name, value in values.items()]  # fmt: skip
        if chosen is None and median <= MEDIAN and not shuffled:
            chosen = f"{case}: score.max_entropy {round(math.log(limit), 4) if math.isfinite(limit) else None}"
    print(f"the rule takes: {chosen}")
    race.write("specificity", records)


if __name__ == "__main__":
    main()
