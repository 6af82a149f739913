"""Stage `ablate`: remove each language's features and measure the NLL of every language on held-out text."""

import logging
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from babelscope import config
from babelscope.config import schema
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_table, write_atomically, write_json
from babelscope.core.fingerprint import dvc_md5, fingerprint
from babelscope.core.progress import Progress
from babelscope.core.resume import scratch

CORPUS, FEATURES = Path("data/corpus/texts.parquet"), Path("data/scores/features.parquet")
COUNTS, NEURONS, SAES, OUT = Path("data/counts"), Path("data/neurons"), Path("data/sae"), Path("data/ablation")
log = logging.getLogger(__name__)


def main() -> None:
    params = config.load()
    import numpy as np
    import torch

    from babelscope import sae
    from babelscope.ablation import results, sequential
    from babelscope.ablation.conditions import conditions
    from babelscope.ablation.interventions import interventions, neurons
    from babelscope.models import hardware, hookpoints, loading, matmul, tokens

    knobs = params.ablate
    methods = knobs.methods
    device = hardware.prepare(params.hardware)
    features = read_table(FEATURES)
    corpus = read_table(CORPUS).filter(split="eval")
    tokenizer = loading.load_tokenizer(params.model)
    of = dict(zip(corpus["text_id"], corpus["language"], strict=True))
    ready = tokens.tokenize(tokenizer, corpus["text_id"].to_list(), corpus["text"].to_list(), params.corpus.max_tokens)
    texts = tokens.by_length(tokens.within(ready, of, knobs.tokens))
    language = [of[text.text_id] for text in texts]
    places = {method: hookpoints_of(method, features, params) for method in methods}
    counts = {name: read_counts(method, name) for method, names in places.items() for name in names}
    totals = {method: read_totals(method, names[0]) for method, names in places.items()}
    saes = sae.SAECache(SAES, params.hookpoints if set(methods) != {"neuron"} else [], device)
    model = loading.load_model(params.model, knobs.dtype).to(device)
    matmul.use_in(model)
    hookpoints.resolve(model, list(counts))

    depends = params.model_dump(include={"ablate", "hookpoints", "languages", "model", "seed"})
    depends |= {"neurons": params.neurons.hookpoints, "max_tokens": params.corpus.max_tokens}
    depends |= {"ratio": params.score.ratio}
    hashes = {str(path): dvc_md5(path) for path in (CORPUS, FEATURES, COUNTS, NEURONS, SAES)}
    keep = scratch(fingerprint("ablate", depends, hashes))
    tables: list[pl.DataFrame] = []
    controls: list[pl.DataFrame] = []
    primary = schema.primary_method(methods)
    numbers: dict[str, float | str] = {"primary_method": primary}
    for method, names in places.items():
        what = conditions(
            features.filter(kind="neuron" if method == "neuron" else "sae"),
            {name: counts[name] for name in names},
            totals[method],
            params.languages,
            ratio=params.score.ratio, by_layer=knobs.by_layer, draws=knobs.control_draws, seed=params.seed,
        )  # fmt: skip
        if method == "neuron":
            width = {name: hookpoints.width(model, name) for name in names}
            make = partial(neurons, width=width, device=device)
        else:
            largest = {name: largest_activation(counts[name], saes[name].latents) for name in names}
            make = partial(interventions, method, saes=saes, largest=largest, m=knobs.additive_factor)
        asked = what.asked(language, np.array([*map(targets, texts)]), knobs.others_tokens)
        nll, what = sequential.measure(
            what, texts, language, torch.from_numpy(asked),
            partial(measure, model, make, method, knobs.batch_tokens), keep / method,
            resamples=knobs.bootstrap, seed=params.seed,
        )  # fmt: skip
        context = nll, what, method, language, params.languages, knobs.bootstrap, params.seed
        found, control = results.table(*context), results.control(*context)
        figures = results.figures(found, control, params.languages) | {"share_computed": nll.share}
        numbers |= {key if method == primary else f"{method}/{key}": value for key, value in figures.items()}
        tables.append(found)
        controls.append(control)
        report(found, control, figures, params.languages)
    write(pl.concat(tables), pl.concat(controls), numbers)
    shutil.rmtree(keep, ignore_errors=True)


def measure(
    model: Any, make: Any, method: str, batch_tokens: int, what: Any, texts: list[Any], asked: Any, keep: Path
) -> Any:
    """The NLL of texts under the conditions `what`, of which `make` makes interventions."""
    from babelscope.ablation.ablate import ablate

    with Progress(f"ablate {method}", sum(map(targets, texts)), "tokens") as progress:
        return ablate(model, make(what.units), texts, batch_tokens, asked=asked, keep=keep, advance=progress.update)


def targets(text: Any) -> int:
    """The tokens of a text that have one before them and are not special."""
    return int(max(len(text.ids) - max(text.special, 1), 0))


def hookpoints_of(method: str, features: pl.DataFrame, params: config.Config) -> list[str]:
    """Where a method works: at the SAEs of params.yaml, or wherever there are selected neurons."""
    if method != "neuron":
        return params.hookpoints
    found = set(features.filter(kind="neuron")["hookpoint"])
    names = [name for name in params.neurons.hookpoints if name in found]
    if not names:
        raise UserError(
            f"params.yaml: ablate.methods: 'neuron', but {FEATURES} holds no neurons; "
            "a lower neurons.quantile or a higher neurons.top_rate finds some"
        )
    return names


def read_counts(method: str, hookpoint: str) -> pl.DataFrame:
    folder = NEURONS if method == "neuron" else COUNTS
    return read_table(folder / f"{hookpoint}.parquet").select("unit", "language", "tokens", "max")


def read_totals(method: str, hookpoint: str) -> pl.DataFrame:
    if method == "neuron":
        return read_table(NEURONS / "totals.parquet")
    return read_table(COUNTS / f"{hookpoint}.totals.parquet")


def largest_activation(counts: pl.DataFrame, latents: int) -> Any:
    """The largest activation of every latent on the training texts, float32 `[latents]`; 0 where it never fires."""
    import torch

    largest = torch.zeros(latents)
    top = counts.group_by("unit").agg(pl.col("max").max())
    largest[top["unit"].cast(pl.Int64).to_torch()] = top["max"].cast(pl.Float32).to_torch()
    return largest


def write(found: pl.DataFrame, controls: pl.DataFrame, numbers: Mapping[str, float | str]) -> None:
    """Write the matrix of all hookpoints together, that of each alone, the controls, and the numbers that sum up."""
    from babelscope.ablation.results import COLUMNS

    together, alone = found.filter(pl.col("hookpoint").is_null()), found.filter(pl.col("hookpoint").is_not_null())
    write_atomically(OUT / "nll.parquet", together.select(COLUMNS).write_parquet)
    write_atomically(OUT / "by_layer.parquet", alone.select("hookpoint", "layer", *COLUMNS).write_parquet)
    write_atomically(OUT / "control.parquet", controls.write_parquet)
    write_json(Path("metrics/ablate.json"), dict(numbers))


def report(found: pl.DataFrame, control: pl.DataFrame, numbers: Mapping[str, float], languages: list[str]) -> None:
    matrix = found.filter(pl.col("hookpoint").is_null(), pl.col("control").is_null())
    against = {row["language"]: row for row in control.iter_rows(named=True)}
    rows = []
    for name in languages:
        others = max(matrix.filter(pl.col("ablated") == name, pl.col("evaluated") != name)["delta"], default=0.0)
        row = against.get(name)
        parts = [f"{row[f'{k}_low']:+.4f} to {row[f'{k}_high']:+.4f}" if row else "-" for k in ("excess", "contrast")]
        rows.append([name, f"{numbers[f'dnll_own/{name}']:+.4f}", f"{others:+.4f}", *parts])
    head = ["ablated", "own dNLL", "largest other dNLL", "own - control (95 %)", "own - others, less the control's"]
    stage.table(head, rows)
    alone = []
    for key, own in numbers.items():
        what, _, hookpoint = key.partition("/")
        if what == "own_alone":
            beside = numbers.get(f"others_alone/{hookpoint}")
            alone.append([hookpoint, f"{own:+.4f}", "-" if beside is None else f"{beside:+.5f}"])
    if alone:
        stage.table(["alone", "own dNLL", "others' dNLL"], alone)
    log.info(
        "own %+.4f nats/token, others %.5f in mean size (%+.5f in mean); diagonal largest in %d of %d rows (its 95 %% "
        "interval above 0 in %d), %d columns; above the control in %s, selective beyond it in %s; "
        "%.1f %% of whole passes computed",
        numbers["own"], numbers["others_abs"], numbers["others"],
        numbers["rows"], len(languages), numbers["rows_above_zero"], numbers["columns"],
        numbers.get("languages_above_control", "-"), numbers.get("languages_selective", "-"),
        100 * numbers["share_computed"],
    )  # fmt: skip


if __name__ == "__main__":
    stage.run(main)
