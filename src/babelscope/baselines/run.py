"""Stage `baselines`: what language features do next to directions, frozen dictionaries and neurons at one hookpoint.

All identify the language of the same held-out texts, selected or fitted on all training texts and on each domain.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import torch

from babelscope import sae
from babelscope.activations.rows import read_rows
from babelscope.activations.store import ActivationStore, opened
from babelscope.baselines import dictionaries, directions, intervals, removal, selection
from babelscope.baselines.directions import Classifier, Floats
from babelscope.baselines.repeats import REPEATS, repeats
from babelscope.baselines.selection import ALL, Again, Dictionary, Stored
from babelscope.config import Config
from babelscope.core import resume, stage
from babelscope.core.files import read_table, write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.corpus.lid import FastText
from babelscope.models import hardware, loading, matmul, tokens
from babelscope.models import hookpoints as hooks

# Pairs that are hard to tell apart, or share a script: by the language's code without region.
PAIRS = (("es", "pt"), ("ru", "bg"), ("zh", "ja"), ("de", "en"))
Schema = dict[str, type[pl.DataType]]
_INTERVAL: Schema = dict.fromkeys(["difference", "difference_low", "difference_high"], pl.Float64)
IDENTIFICATION: Schema = dict.fromkeys(["method", "trained_on", "evaluated_on", "languages"], pl.String)
IDENTIFICATION |= {"texts": pl.Int64} | dict.fromkeys(["accuracy", "low", "high"], pl.Float64) | _INTERVAL
REMOVAL: Schema = dict.fromkeys(["method", "trained_on", "evaluated_on"], pl.String)
REMOVAL |= dict.fromkeys([f"{k}{e}" for k in ("own", "others", "contrast") for e in ("", "_low", "_high")], pl.Float64)
REMOVAL |= {"correlation": pl.Float64}
FEATURES = {"unit": pl.Int32, "language": pl.String, "selected_on": pl.String, "domain": pl.String}
FEATURES |= {"selected": pl.Boolean, "same_language": pl.Boolean}
log = logging.getLogger(__name__)


def run(params: Config, paths: Paths) -> None:
    """Write the tables below `paths.baselines` and the stage's metrics."""
    tables: dict[str, pl.DataFrame] = {
        "identification": pl.DataFrame(schema=IDENTIFICATION), "removal": pl.DataFrame(schema=REMOVAL),
        "repeats": pl.DataFrame(schema=REPEATS), "transfer": pl.DataFrame(schema=FEATURES),
    }  # fmt: skip
    if params.stability.hookpoints and not params.train.transcode:
        tables |= compare(params.stability.hookpoints[0], params, paths)
    for name, table in tables.items():
        write_atomically(paths.baselines / f"{name}.parquet", table.write_parquet)
    write_json(paths.metrics("baselines"), figures(**tables))
    report(tables["identification"], tables["removal"], tables["repeats"])


def compare(hookpoint: str, params: Config, paths: Paths) -> dict[str, pl.DataFrame]:
    """The tables of the stage."""
    device, size, languages = hardware.prepare(params.hardware), params.encode.chunk_tokens, params.languages
    stored = read_stored(hookpoint, params.languages, paths)
    domains = shared_domains(stored.texts, languages)
    every = [trained(name, hookpoint, stored, params, paths, device)
             for name in (intervals.REFERENCE, *params.baselines.dictionaries)]  # fmt: skip
    selected = read_table(paths.features).filter(kind="sae", hookpoint=hookpoint)
    every[0].units[ALL] = selected.select("language", "unit", "probability", "rank")
    for one in every:
        for domain in (ALL, *domains):
            if domain not in one.units:
                one.units[domain] = choose(one, one.counted, domain, len(selected), params)
    for one in every[1:]:
        if one.units[ALL].is_empty():
            log.warning("%s: no unit is specific to a language by the rules of params.yaml: score; left out", one.name)
            every.remove(one)
    x = {split: selection.text_means(stored, split, size) for split in ("train", "eval")}
    found = {
        "identification": identification(every, x, stored.texts, domains, params, paths, device),
        "repeats": repeats(every, x, stored.texts, params, device),
        "transfer": transfer(every[0], domains, languages, params.score.ratio),
    }
    if params.baselines.ablation_tokens:
        fitted = fit(x["train"], stored.texts.filter(split="train"), ALL, languages)
        found["removal"] = removals(every, fitted, domains, params, paths, device)
    return found


def read_stored(hookpoint: str, languages: Sequence[str], paths: Paths) -> Stored:
    """The stored activations of a hookpoint with the texts, whose `domain` is the last part of their `source`."""
    table = read_rows(paths, languages)
    texts = table.group_by("text_id", maintain_order=True).agg(
        pl.col("language", "split").first(), tokens=pl.len().cast(pl.Int64)
    )
    source = read_table(paths.texts, columns=["text_id", "source"])
    texts = texts.join(source, on="text_id", how="left", maintain_order="left").with_columns(
        domain=pl.col("source").str.extract(r"([^:/]+)/?$").str.replace_all(r"[^\w.-]", "_")
    )
    return Stored(
        opened(paths, hookpoint), texts, table["row"].to_torch(),
        table["text_id"].rle_id().cast(pl.Int64).to_torch(),
    )  # fmt: skip


def shared_domains(texts: pl.DataFrame, languages: Sequence[str]) -> list[str]:
    """The domains with texts of every language in both splits, or [] if there are fewer than two."""
    count = texts.select("domain", "language", "split").unique().group_by("domain").len()
    found = count.filter(pl.col("len") == 2 * len(languages))["domain"].drop_nulls().sort().to_list()
    return found if len(found) > 1 else []


def trained(
    name: str, hookpoint: str, stored: Stored, params: Config, paths: Paths, device: torch.device
) -> Dictionary:
    """A dictionary with its firings; `name`: `intervals.REFERENCE` or one of `baselines.dictionaries`."""
    size = params.encode.chunk_tokens
    at = paths if name == intervals.REFERENCE else dictionaries.at(paths, name)
    if at.activations != paths.activations:
        [folder] = at.activations.iterdir()
        stored = stored._replace(store=ActivationStore(folder))
    read = stored.store.index["hookpoint"]
    if name == "neurons":
        return Dictionary(name, read, stored, None, selection.counts(stored, None, read, size, device))
    first = sae.load(at.saes, hookpoint).to(device)
    found = Dictionary(name, read, stored, first, selection.counts(stored, first, read, size, device))
    if name == intervals.REFERENCE:
        units = read_table(paths.features_again).filter(hookpoint=hookpoint)
        for seed in params.stability.seeds:
            other = sae.load(paths.saes_again / str(seed), hookpoint).to(device)
            found.again[seed] = Again(other, units.filter(seed=seed))
    else:
        second = sae.load(at.saes_again, hookpoint).to(device)
        counted = selection.counts(stored, second, read, size, device)
        found.again[params.stability.seeds[0]] = Again(second, choose(found, counted, ALL, 0, params), counted)
    return found


def choose(one: Dictionary, counted: pl.DataFrame, domain: str, wanted: int, params: Config) -> pl.DataFrame:
    """The units selected on the texts of a domain; of neurons, as many as there are features."""
    texts = None if domain == ALL else domain
    totals = selection.totals(one.stored, texts, params.languages)
    neurons = (one.stored.store.d, wanted) if one.sae is None else None
    return selection.select(counted, totals, texts, params.score, neurons)


def chosen(texts: pl.DataFrame, domain: str, among: Sequence[str]) -> pl.Series:
    """Which of `texts` are in a domain and in the languages `among`."""
    mask = texts["language"].is_in(list(among))
    return mask if domain == ALL else mask & (texts["domain"] == domain).fill_null(False)


def fit(x: Floats, texts: pl.DataFrame, domain: str, among: Sequence[str]) -> dict[str, Classifier]:
    """Every method of `directions`, fitted on the `texts` (train split) of a domain in the languages `among`."""
    mask = chosen(texts, domain, among)
    codes = tokens.codes(texts.filter(mask)["language"], among).numpy()
    return {name: method(x[mask.to_numpy()], codes, len(among)) for name, method in directions.METHODS.items()}


def identification(
    every: Sequence[Dictionary], x: Mapping[str, Floats], texts: pl.DataFrame, domains: Sequence[str], params: Config,
    paths: Paths, device: torch.device,
) -> pl.DataFrame:  # fmt: skip
    """The accuracy of every method, by the domain of the training texts, of the held-out texts, and by languages."""
    languages = params.languages
    train_texts, held_out = texts.filter(split="train"), texts.filter(split="eval")
    raw = held_out.join(
        read_table(paths.texts).select("text_id", "text"), on="text_id", how="left", maintain_order="left"
    )
    lid = FastText()
    known, _ = lid.match(languages)
    parts = []
    for domain in (ALL, *domains):
        totals = {
            one.name: selection.unit_totals(
                one.stored, one.sae, one.hookpoint, one.units[domain], languages, params.encode.chunk_tokens, device
            )
            for one in every
            if len(one.units[domain])
        }
        classifiers = fit(x["train"], train_texts, domain, languages)
        for among in (list(languages), *(pairs(languages) if domain == ALL else ())):
            columns = [languages.index(name) for name in among]
            for evaluated in (ALL, *domains) if domain == ALL else domains:
                mask = chosen(held_out, evaluated, among)
                truth = held_out.filter(mask)["language"]
                right = {}
                for one in every:
                    if one.name in totals:
                        answers = selection.predicted(totals[one.name].filter(mask), one.units[domain], among)
                        right[one.name] = (answers == truth).fill_null(False).to_numpy()
                codes = tokens.codes(truth, among).numpy()
                for name, classifier in classifiers.items():
                    scores = classifier.scores(x["eval"][mask.to_numpy()])[:, columns]
                    right[name] = scores.argmax(axis=1) == codes
                labels = {label: name for label, name in known.items() if name in among}
                if len(labels) == len(among):
                    answers = lid.predict(raw.filter(mask)["text"].to_list(), labels)["predicted"]
                    right["fasttext"] = (answers == truth).fill_null(False).to_numpy()
                found = intervals.accuracies(right, params.ablate.bootstrap, params.seed)
                parts.append(found.select(
                    "method", pl.lit(domain).alias("trained_on"), pl.lit(evaluated).alias("evaluated_on"),
                    pl.lit(ALL if among == list(languages) else "/".join(among)).alias("languages"),
                    *list(IDENTIFICATION)[4:],
                ))  # fmt: skip
    return pl.concat(parts).cast(IDENTIFICATION)  # type: ignore[arg-type]


def pairs(languages: Sequence[str]) -> list[list[str]]:
    """Those of `PAIRS` that are among the languages."""
    by_code = {name.split("-")[0].split("_")[0]: name for name in reversed(languages)}
    return [[by_code[a], by_code[b]] for a, b in PAIRS if a in by_code and b in by_code]


def transfer(one: Dictionary, domains: Sequence[str], languages: Sequence[str], ratio: float) -> pl.DataFrame:
    """What becomes of features selected on one domain in the others.

    One row per feature of `selected_on` and other `domain`: `selected`, whether it is selected there for the same
    language; `same_language`, whether that language is the only one there with at least `ratio` times its highest rate.
    """
    parts = [pl.DataFrame(schema=FEATURES)]
    for domain in domains:
        totals = selection.totals(one.stored, domain, languages).select("language", total="tokens")
        rate = one.counted.filter(domain=domain).join(totals, on="language")
        rate = rate.with_columns(share=pl.col("tokens") / pl.col("total"))
        members = rate.filter(pl.col("share") >= ratio * pl.col("share").max().over("unit"))
        alone = members.filter(pl.len().over("unit") == 1).select("unit", "language", same_language=pl.lit(True))
        again = one.units[domain].select("unit", "language", selected=pl.lit(True))
        for other in domains:
            if other != domain:
                found = one.units[other].select("unit", "language").join(again, on=["unit", "language"], how="left")
                found = found.join(alone, on=["unit", "language"], how="left")
                found = found.with_columns(pl.col("selected", "same_language").fill_null(False))
                labels = {"selected_on": pl.lit(other), "domain": pl.lit(domain)}
                parts.append(found.with_columns(**labels).select(pl.col(k).cast(t) for k, t in FEATURES.items()))
    return pl.concat(parts).sort("selected_on", "domain", "language", "unit")


def removals(
    every: Sequence[Dictionary], fitted: Mapping[str, Classifier], domains: Sequence[str], params: Config, paths: Paths,
    device: torch.device,
) -> pl.DataFrame:  # fmt: skip
    """The effect of removing what marks each language, on held-out texts of all domains and of each."""
    corpus, languages = read_table(paths.texts).filter(split="eval"), params.languages
    limit, hookpoint = params.baselines.ablation_tokens, every[0].hookpoint
    domain_of = dict(every[0].stored.texts.select("text_id", "domain").iter_rows())
    tokenizer = loading.load_tokenizer(params.model)
    texts, language = tokens.texts_of(corpus, tokenizer, limit, params.corpus.max_tokens)
    model = loading.load_model(params.model, params.ablate.dtype).to(device)
    matmul.use_in(model)
    jobs: list[tuple[str, str, str, Any]] = [
        (name, ALL, hookpoint, removal.DirectionAblation(classifier, device)) for name, classifier in fitted.items()
    ]
    for one in every:
        if one.name == "random_model":
            continue  # its units are not units of this model
        width = hooks.width(model, one.hookpoint)
        for domain in (ALL, *domains) if one.name == intervals.REFERENCE else (ALL,):
            change = removal.of_units(one.units[domain], one.sae, width, languages, device)
            jobs.append((one.name, domain, one.hookpoint, change))
    seeds = [f"{intervals.REFERENCE}-seed-{seed}" for seed in every[0].again]
    for name, again in zip(seeds, every[0].again.values(), strict=True):
        change = removal.of_units(again.units, again.sae, 0, languages, device)
        jobs.append((name, ALL, hookpoint, change))
    changes: dict[tuple[str, str], list[Floats]] = {}
    depends = params.model_dump(include={"baselines", "languages", "model", "score", "seed", "stability"})
    depends |= {"batch_tokens": params.ablate.batch_tokens, "dtype": params.ablate.dtype}
    depends |= {"max_tokens": params.corpus.max_tokens, "chunk_tokens": params.encode.chunk_tokens}
    inputs = [paths.texts, paths.activations / hookpoint, paths.features, paths.features_again, paths.saes]
    inputs += [paths.tokens, paths.saes_again]
    with resume.kept("baselines", depends, [*inputs, *map(paths.dictionary, params.baselines.dictionaries)]) as folder:
        for number, (name, domain, at, intervention) in enumerate(jobs):
            nll = removal.measure(
                model, at, intervention, texts, language, languages, params.ablate.batch_tokens, limit,
                folder / str(number),
            )  # fmt: skip
            changes[name, domain] = [(nll.ablated - nll.clean).numpy()]
    first = changes[intervals.REFERENCE, ALL]
    changes[f"{intervals.REFERENCE}-all-seeds", ALL] = sum((changes[name, ALL] for name in seeds), first)
    of_domain = {
        name: [i for i, text in enumerate(texts) if name in (ALL, domain_of.get(text.text_id))]
        for name in (ALL, *domains)
    }
    return removal_table(changes, seeds, nll.tokens.numpy(), language, of_domain, params)


def removal_table(
    changes: Mapping[tuple[str, str], list[Floats]], seeds: Sequence[str], count: Any, language: Sequence[str],
    of_domain: Mapping[str, list[int]], params: Config,
) -> pl.DataFrame:  # fmt: skip
    """The table `removal`, from the change of the NLL of every text (see `intervals.effects`).

    `correlation`: of features of another seed, over the cells of the matrix (removed language, language of the texts),
    with the matrix of the first SAE. In rows with several SAEs, these are a level of the resampling.

    `changes`: by method and domain. `seeds`: the methods that are features of another seed. `count`: tokens of each
    text. `of_domain`: the numbers of the texts of a domain.
    """
    languages, rows, first = params.languages, [], changes[intervals.REFERENCE, ALL]
    for (name, domain), deltas in changes.items():
        correlation = None
        if name in seeds:
            both = [intervals.matrix(change, count, language, languages) for change in (*first, *deltas)]
            correlation = intervals.correlation(*both)
        for evaluated, kept in of_domain.items():
            found = intervals.effects(
                [change[:, kept] for change in deltas], count[kept], [language[i] for i in kept], languages,
                params.ablate.bootstrap, params.seed,
            )  # fmt: skip
            if found:  # a small sample may lack texts of a domain
                labels = {"method": name, "trained_on": domain, "evaluated_on": evaluated}
                rows.append({**labels, **found, "correlation": correlation if evaluated == ALL else None})
    return pl.DataFrame(rows, schema=REMOVAL)


def figures(
    identification: pl.DataFrame, removal: pl.DataFrame, repeats: pl.DataFrame, transfer: pl.DataFrame
) -> dict[str, float]:
    """Flat key figures.

    `accuracy/<method>` and `difference/<method>` (to the features) on all languages and texts, each with `_low` and
    `_high`; `accuracy/<method>/<languages>` of pairs; `accuracy/<method>/<trained on>/<evaluated on>` of domains, on
    all languages; `own/<method>` and `others/<method>` (nats/token) without what marks the language, with intervals;
    `repeat/<method>` (mean cosine), `agreement/<method>` and `matched/<method>` of `repeats` (means over the languages)
    with intervals; `correlation/<method>` of the removal with that of the first SAE; `survive/<domain>/<other>` and
    `same_language/<domain>/<other>`, the share of the features selected on one domain that the other selects, or that
    belong to the same language there.
    """
    numbers: dict[str, float] = {}
    for row in identification.iter_rows(named=True):
        method, pair = row["method"], f"{row['trained_on']}/{row['evaluated_on']}"
        if row["languages"] == ALL and pair == f"{ALL}/{ALL}":
            for key in ("accuracy", "difference"):
                value, ends = row[key], ("low", "high") if key == "accuracy" else ("difference_low", "difference_high")
                if value is not None and (key == "accuracy" or method != intervals.REFERENCE):
                    numbers[f"{key}/{method}"] = value
                    numbers |= {f"{key}_{end.rpartition('_')[2]}/{method}": row[end] for end in ends}
        elif row["languages"] == ALL:
            numbers[f"accuracy/{method}/{pair}"] = row["accuracy"]
        elif pair == f"{ALL}/{ALL}":
            numbers[f"accuracy/{method}/{row['languages'].replace('/', '-')}"] = row["accuracy"]
    for row in removal.iter_rows(named=True):
        pair = "" if row["trained_on"] == row["evaluated_on"] == ALL else f"/{row['trained_on']}/{row['evaluated_on']}"
        known = [key for key in list(REMOVAL)[3:] if row[key] is not None]
        numbers |= {f"{key}/{row['method']}{pair}": row[key] for key in known}
    for (name,), rows in repeats.group_by("method", maintain_order=True):
        for key, column in (("repeat", "cosine"), ("agreement", "agreement"), ("matched", "matched")):
            if len(values := rows[column].drop_nulls()):
                numbers |= {f"{key}{end}/{name}": value for end, value in intervals.mean(values.to_numpy()).items()}
    for (one, other), rows in transfer.group_by("selected_on", "domain", maintain_order=True):
        numbers[f"survive/{one}/{other}"] = rows["selected"].mean()  # type: ignore[assignment]
        numbers[f"same_language/{one}/{other}"] = rows["same_language"].mean()  # type: ignore[assignment]
        numbers[f"selected/{one}"] = len(rows)
    return numbers


def report(identification: pl.DataFrame, removal: pl.DataFrame, repeats: pl.DataFrame) -> None:
    """Log a line per method and setting."""
    if identification.is_empty():
        log.info("baselines: none (params.yaml: stability.hookpoints)")
        return
    lines = [
        [*row[:4], row[4], f"{100 * row[5]:.1f} %", f"{100 * row[6]:.1f} to {100 * row[7]:.1f}"]
        for row in identification.filter(languages=ALL).iter_rows()
    ]
    stage.table(["method", "trained on", "evaluated on", "languages", "texts", "accuracy", "95 %"], lines, labels=4)
    if len(removal):
        rows = removal.filter(trained_on=ALL, evaluated_on=ALL).iter_rows(named=True)
        stage.table(
            ["removed", "own dNLL", "others' dNLL"],
            [[r["method"], f"{r['own']:+.4f}", f"{r['others']:+.4f}"] for r in rows],
        )
    means = repeats.group_by("method", maintain_order=True).agg(pl.col("cosine", "agreement").mean())
    stage.table(["repeated", "mean cosine", "same answer"], [
        [name, *("-" if mean is None else f"{mean:.3f}" for mean in both)] for name, *both in means.iter_rows()
    ])  # fmt: skip
