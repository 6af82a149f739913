"""Stage `ablate`: remove each language's features and measure the NLL of every language on held-out text."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from babelscope import sae
from babelscope.ablation import ranking, statistics
from babelscope.ablation.ablate import TextNLL, ablate
from babelscope.ablation.attribution import attribute
from babelscope.ablation.conditions import Conditions, control_rates, first_half
from babelscope.ablation.conditions import conditions as all_conditions
from babelscope.ablation.interventions import Intervention, interventions, neurons
from babelscope.ablation.statistics import against_control
from babelscope.config import Config, schema
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_table, write_atomically, write_json
from babelscope.core.fingerprint import dvc_md5, fingerprint
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.core.resume import scratch
from babelscope.models import hardware, hookpoints, loading, matmul, tokens
from babelscope.models.nll import target_count
from babelscope.models.partial import suits
from babelscope.models.tokens import TokenizedText

log = logging.getLogger(__name__)

# Control draws after which the comparison of a language with its controls may end.
FIRST = 2

# Measures the pairs of a bool `[conditions, texts]`; a folder keeps the results of an interrupted run.
Measure = Callable[[Conditions, list[TokenizedText], Tensor, Path], TextNLL]


def run(params: Config, paths: Paths) -> None:
    """Ablate by every method of params.yaml; write the tables in `paths.ablation` and the stage's metrics."""
    section, languages = params.ablate, params.languages
    device = hardware.prepare(params.hardware)
    features, corpus = read_table(paths.features), read_table(paths.texts)
    tokenizer = loading.load_tokenizer(params.model)
    texts, language = tokens.texts_of(corpus.filter(split="eval"), tokenizer, section.tokens, params.corpus.max_tokens)
    names_by_method = {method: hookpoints_of(method, features, params, paths) for method in section.methods}
    counts = {name: _counts(paths, method, name) for method, names in names_by_method.items() for name in names}
    saes = sae.SAECache(paths.saes, params.hookpoints if set(section.methods) != {"neuron"} else [], device)
    model = loading.load_model(params.model, section.dtype).to(device)
    matmul.use_in(model)
    hookpoints.resolve(model, list(counts))
    suits(model, max((len(text.ids) for text in texts), default=0))  # once, for the longest text of all steps

    keep = _scratch(params, paths)
    primary = schema.primary_method(section.methods)
    numbers: dict[str, float | str] = {"primary_method": primary}
    tables: list[pl.DataFrame] = []
    controls: list[pl.DataFrame] = []
    bounds: list[pl.DataFrame] = []
    ranks = None
    if "feature" in section.methods and section.rank_tokens:
        chosen = tokens.texts_of(corpus.filter(split="train"), tokenizer, section.rank_tokens, params.corpus.max_tokens)
        ranks = rank(model, saes, features.filter(kind="sae"), *chosen, languages, section.batch_tokens)
    for method, names in names_by_method.items():
        every = all_conditions(
            features.filter(kind="neuron" if method == "neuron" else "sae"),
            {name: counts[name] for name in names},
            _totals(paths, method, names[0]),
            languages,
            ratio=params.score.ratio, by_layer=section.by_layer, draws=section.control_draws, seed=params.seed,
            script_draws=section.script_draws, ranking=ranks if method == "feature" else None,
        )  # fmt: skip
        if method == "neuron":
            width = {name: hookpoints.width(model, name) for name in names}
            intervene = partial(neurons, width=width, device=device)
        else:
            largest = {name: _largest_activation(counts[name], saes[name].latents) for name in names}
            means = {
                name: _mean_activation(counts[name], _totals(paths, method, name), saes[name].latents, languages)
                for name in names if method in ("mean", "swap")
            }  # fmt: skip
            intervene = partial(
                interventions, method, saes=saes, largest=largest, m=section.additive_factor, means=means
            )
        nll, measured = measure_until_decided(
            every, texts, language, every.asked(language, np.array([*map(target_count, texts)]), section.others_tokens),
            partial(_measure, model, intervene, method, section, languages), keep / method,
            resamples=section.bootstrap, seed=params.seed,
        )  # fmt: skip
        done = statistics.Measured(nll, measured, method, language, languages, section.bootstrap, params.seed)
        found, control = statistics.tables(done)
        figures = statistics.figures(found, control, languages) | {"share_computed": nll.share}
        figures |= statistics.divergence(done)
        figures |= control_rates(measured, {name: counts[name] for name in names})
        bound = statistics.compared(done, script=True)
        figures |= statistics.against_script(bound)
        if ranks is not None and method == "feature":
            curve, more = ranking.curve(done)
            figures |= more
            write_atomically(paths.ablation / "ranking.parquet", ranks.write_parquet)
            write_atomically(paths.ablation / "curve.parquet", curve.write_parquet)
        numbers |= {key if method == primary else f"{method}/{key}": value for key, value in figures.items()}
        tables.append(found)
        controls.append(control)
        bounds.append(bound)
        report(found, control, figures, languages)
    found, is_alone = pl.concat(tables), pl.col("hookpoint").is_not_null()
    write_atomically(paths.ablation / "nll.parquet", found.filter(~is_alone).select(statistics.COLUMNS).write_parquet)
    alone = found.filter(is_alone).select("hookpoint", "layer", *statistics.COLUMNS)
    write_atomically(paths.ablation / "by_layer.parquet", alone.write_parquet)
    write_atomically(paths.ablation / "control.parquet", pl.concat(controls).write_parquet)
    if section.script_draws:
        write_atomically(paths.ablation / "control_script.parquet", pl.concat(bounds).write_parquet)
    write_json(paths.metrics("ablate"), numbers)
    shutil.rmtree(keep, ignore_errors=True)


def rank(
    model: Any,
    saes: Mapping[str, sae.SAE] | sae.SAECache,
    features: pl.DataFrame,
    texts: list[TokenizedText],
    language: list[str],
    languages: list[str],
    batch_tokens: int,
) -> pl.DataFrame:
    """`ranking.ranking` by the effects on `texts`, with half of each language's own features removed from them."""
    group = [languages.index(name) for name in language]
    with Progress("rank", sum(map(target_count, texts)), "tokens") as progress:
        removed = {name: torch.zeros((len(languages), saes[name].latents), dtype=torch.bool) for name in saes}
        for hookpoint, unit, name in features.select("hookpoint", "unit", "language").iter_rows():
            removed[hookpoint][languages.index(name), unit] = True
        effects = attribute(
            model, saes, texts, group, len(languages), batch_tokens, removed=removed, advance=progress.update
        )
    return ranking.ranking(features, {name: effect.numpy() for name, effect in effects.items()}, languages)


def measure_until_decided(
    conditions: Conditions,
    texts: Sequence[TokenizedText],
    language: Sequence[str],
    asked: NDArray[np.bool_],
    measure: Measure,
    keep: Path,
    *,
    resamples: int,
    seed: int,
) -> tuple[TextNLL, Conditions]:
    """Measure all conditions, the controls in three steps.

    The steps are the first `FIRST` draws on one half of the texts, then on the other, and the later draws on all texts.
    A language whose comparison with its controls is decided after a step (`against_control`) gets no further controls.

    Parameters
    ----------
    conditions: all of them.
    texts: in `by_length` order.
    language: of each text.
    asked: bool `[conditions, texts]`, see `Conditions.asked`.
    measure: see `Measure`.
    keep: folder for the results of an interrupted run.
    resamples, seed: of the bootstrap.

    Returns
    -------
    The NLLs, and the conditions that were measured.
    """
    keys, is_first = conditions.keys, first_half(language)
    every_text = np.ones(len(texts), dtype=bool)
    is_control = (keys["control"].is_not_null() & keys["top"].is_null()).to_numpy()
    of_pool = keys.select("ablated", "script").rows()
    is_later = (keys["control"].fill_null(0) >= FIRST).to_numpy()
    names = keys["ablated"].unique(maintain_order=True).to_list()
    every = torch.full(asked.shape, torch.nan, dtype=torch.float64)
    none = torch.zeros(len(texts), dtype=torch.int64)
    nll = TextNLL(every[0].clone(), every, none, 0, 0, 0, every.clone(), none.clone())
    undecided = np.ones(len(keys), dtype=bool)
    for step, (rows, columns) in enumerate(((~is_later, is_first), (~is_later, ~is_first), (is_later, every_text))):
        wanted = asked & (rows & (undecided | ~is_control))[:, None] & columns
        row = wanted.any(1).nonzero()[0]
        # The first two steps measure the clean NLL of every text.
        column = (columns & (wanted.any(0) | (step < 2))).nonzero()[0]
        if len(row):
            pairs = torch.from_numpy(wanted[np.ix_(row, column)])
            part = measure(conditions.only(row), [texts[number] for number in column], pairs, keep / f"step-{step}")
            nll.add(part, torch.from_numpy(row), torch.from_numpy(column))
        change = (every - nll.clean).numpy()
        known, decided = keys.filter(pl.Series(np.isfinite(change).any(1))), set()
        for script in (False, True):
            together = statistics.pool(known, script)
            found = against_control(change, nll.tokens.numpy(), language, together, names, resamples, seed)
            decided |= {(name, script) for name in found.filter("decided")["language"]}
        undecided = np.array([pair not in decided for pair in of_pool])
    measured = (~is_later | np.isfinite(every.numpy()).any(1)).nonzero()[0]
    nll.ablated, nll.kl = every[measured], nll.kl[measured]
    return nll, conditions.only(measured)


def _measure(
    model: Any,
    intervene: Callable[..., Mapping[str, Intervention]],
    method: str,
    section: schema.Ablate,
    languages: Sequence[str],
    conditions: Conditions,
    texts: list[TokenizedText],
    asked: Tensor,
    keep: Path,
) -> TextNLL:
    """The NLL of texts under conditions, which `intervene` turns into interventions."""
    with Progress(f"ablate {method}", sum(map(target_count, texts)), "tokens") as progress:
        options = (
            {"ablated": [languages.index(name) for name in conditions.keys["ablated"]]} if method != "neuron" else {}
        )
        made = intervene(conditions.units, **options)
        return ablate(
            model, made, texts, section.batch_tokens, asked=asked,
            diverging=conditions.whole().to_torch(), kl_every=section.kl_every, keep=keep, advance=progress.update,
        )  # fmt: skip


def hookpoints_of(method: str, features: pl.DataFrame, params: Config, paths: Paths) -> list[str]:
    """The hookpoints of a method: those of the SAEs in params.yaml, or those with selected neurons."""
    if method != "neuron":
        return params.hookpoints
    found = set(features.filter(kind="neuron")["hookpoint"])
    names = [name for name in params.neurons.hookpoints if name in found]
    if not names:
        raise UserError(
            f"params.yaml: ablate.methods: 'neuron', but {paths.features} holds no neurons; "
            "a lower neurons.quantile or a higher neurons.top_rate finds some"
        )
    return names


def _counts(paths: Paths, method: str, hookpoint: str) -> pl.DataFrame:
    path = paths.neurons / f"{hookpoint}.parquet" if method == "neuron" else paths.counts(hookpoint)
    return read_table(path).select("unit", "language", "tokens", "sum", "max")


def _totals(paths: Paths, method: str, hookpoint: str) -> pl.DataFrame:
    return read_table(paths.neurons / "totals.parquet" if method == "neuron" else paths.totals(hookpoint))


def _largest_activation(counts: pl.DataFrame, latents: int) -> Tensor:
    """The largest activation of every latent on the training texts, float32 `[latents]`; 0 if it never fires."""
    largest = torch.zeros(latents)
    top = counts.group_by("unit").agg(pl.col("max").max())
    largest[top["unit"].cast(pl.Int64).to_torch()] = top["max"].cast(pl.Float32).to_torch()
    return largest


def _mean_activation(counts: pl.DataFrame, totals: pl.DataFrame, latents: int, languages: Sequence[str]) -> Tensor:
    """The mean activation of every latent over a language's tokens, float32 `[languages, latents]`."""
    means = torch.zeros((len(languages), latents))
    tokens = dict(totals.select("language", "tokens").iter_rows())
    for code, name in enumerate(languages):
        here = counts.filter(pl.col("language") == name)
        means[code, here["unit"].cast(pl.Int64).to_torch()] = here["sum"].cast(pl.Float32).to_torch() / tokens[name]
    return means


def _scratch(params: Config, paths: Paths) -> Path:
    """The folder from which an interrupted run resumes."""
    depends = params.model_dump(include={"ablate", "hookpoints", "languages", "model", "seed"})
    depends |= {"neurons": params.neurons.hookpoints, "max_tokens": params.corpus.max_tokens}
    depends |= {"ratio": params.score.ratio}
    inputs = paths.texts, paths.features, paths.all_counts, paths.neurons, paths.saes
    return scratch(fingerprint("ablate", depends, {str(path): dvc_md5(path) for path in inputs}))


def report(found: pl.DataFrame, control: pl.DataFrame, numbers: Mapping[str, float], languages: list[str]) -> None:
    """Log a line per language, one per hookpoint alone, and a summary."""
    matrix = found.filter(pl.col("hookpoint").is_null(), pl.col("control").is_null())
    row_by_language = {row["language"]: row for row in control.iter_rows(named=True)}
    rows = []
    for name in languages:
        others = max(matrix.filter(pl.col("ablated") == name, pl.col("evaluated") != name)["delta"], default=0.0)
        row = row_by_language.get(name)
        parts = [f"{row[f'{k}_low']:+.4f} to {row[f'{k}_high']:+.4f}" if row else "-" for k in ("excess", "contrast")]
        rows.append([name, f"{numbers[f'dnll_own/{name}']:+.4f}", f"{others:+.4f}", *parts])
    head = ["ablated", "own dNLL", "largest other dNLL", "own - control (95 %)", "own - others, less the control's"]
    stage.table(head, rows)
    alone = []
    for key, own in numbers.items():
        kind, _, hookpoint = key.partition("/")
        if kind == "own_alone":
            others = numbers.get(f"others_alone/{hookpoint}")
            alone.append([hookpoint, f"{own:+.4f}", "-" if others is None else f"{others:+.5f}"])
    if alone:
        stage.table(["alone", "own dNLL", "others' dNLL"], alone)
    log.info(
        "own %+.4f nats/token, others %.5f in mean absolute value (%+.5f in mean); diagonal largest in %d of %d rows "
        "(its 95 %% interval above 0 in %d), %d columns; above the control in %s (%s after Holm), "
        "selective beyond it in %s (%s); %.1f %% of whole passes computed",
        numbers["own"], numbers["others_abs"], numbers["others"],
        numbers["rows"], len(languages), numbers["rows_above_zero"], numbers["columns"],
        *(numbers.get(f"languages_{key}{end}", "-") for key in ("above_control", "selective") for end in ("", "_holm")),
        100 * numbers["share_computed"],
    )  # fmt: skip
