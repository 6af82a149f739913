"""Stage `steer`: which vectors make the model answer in another language than the prompt's, and at what cost.

Vectors from the training split; place and strength from prompts of the training split; figures from held-out prompts.
"""

import logging
from typing import Any, NamedTuple

import polars as pl
import torch

from babelscope import sae
from babelscope.config import Config
from babelscope.core import resume, stage
from babelscope.core.files import read_json, read_table, write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.corpus import further, lid
from babelscope.models import hardware, hookpoints, loading, matmul
from babelscope.models.tokens import TokenizedTexts, check_fits, tokenize, tokenize_corpus, within
from babelscope.models.top_tokens import TopTokens
from babelscope.steering import development, judge, prompts, removal, statistics, vectors
from babelscope.steering.answers import ROWS, Answers, Judge
from babelscope.steering.statistics import FEATURES, NOTHING, PROMPT

log = logging.getLogger(__name__)

# Prompts per setting in the two rounds of development, and prompts per method and language whose NLL is measured.
FIRST, SECOND, WITH_NLL = 2, 4, 1
# Methods whose vectors need activations alone.
DENSE = ("diffmean", "pca", "probe")


class Asked(NamedTuple):
    """The prompts of development and of the test in one list, and what each language's slots are.

    Attributes
    ----------
    rows: all prompts.
    sizes: the lengths of the lists that follow each other in it.
    development, test: by target language, the numbers of its prompts, slot by slot.
    """

    rows: list[prompts.Prompt]
    sizes: list[int]
    development: dict[str, list[int]]
    test: dict[str, list[int]]


def run(params: Config, paths: Paths) -> None:
    """Write `paths.vectors`, the tables of `paths.steering` and the stage's metrics."""
    section, device = params.steer, hardware.prepare(params.hardware)
    identifier = lid.FastText()
    labels, refused = identifier.match(params.languages)
    for language, reason in refused.items():
        log.warning("%s: not steered, since its success cannot be judged: %s", language, reason)
    label = {language: code for code, language in labels.items()}
    tokenizer, corpus = loading.load_tokenizer(params.model), read_table(paths.texts)
    asked = ask(tokenizer, corpus, list(label), params)
    targets = list(asked.test)
    model = loading.load_model(params.model, section.dtype).to(device)
    train = tokenize_corpus(tokenizer, corpus.filter(split="train"), params.corpus.max_tokens)
    check_fits(model, train)
    prompts.check_fits(model, asked.rows, section.new_tokens)
    matmul.use_in(model)
    depends = params.model_dump(include={"hookpoints", "languages", "model", "seed", "steer"})
    depends |= {"neurons": params.neurons.hookpoints, "max_tokens": params.corpus.max_tokens}
    depends["batch_tokens"] = params.extract.batch_tokens
    inputs = [paths.texts, paths.features, paths.all_counts, paths.saes]
    inputs += [paths.neurons] if params.neurons.hookpoints else []
    inputs += [path for path in [paths.ablation / "ranking.parquet"] if path.is_file()]
    with resume.kept("steer", depends, inputs) as folder:
        places = {name: vectors.place_of(name) for name in hookpoints_of(params)}
        encoder = judge.encoder_place(model, next(iter(places.values())))
        reading = list(dict.fromkeys([*places.values(), encoder]))
        hookpoints.resolve(model, reading, "steer.hookpoints")
        rows, codes = vectors.collect(
            model, train, params.languages, reading, section.tokens, params.extract.batch_tokens
        )
        found = compute(params, paths, places, rows, codes)
        vectors.write(paths.vectors, found)
        mean = dict(zip(params.languages, vectors.means(rows[encoder], codes, len(params.languages)), strict=True))
        content = [list(prompt.content) for prompt in asked.rows]
        embedded = judge.embed(model, encoder, content, asked.rows[0].special, params.extract.batch_tokens)
        ask_endpoint = section.relevance == "endpoint"
        jury = Judge(
            identifier, label, encoder, mean, judge.centred(embedded, [p.language for p in asked.rows], mean),
            judge.pools(asked.sizes), tokenizer.batch_decode(content, skip_special_tokens=True),
            judge.Endpoint(params, folder / "judge") if ask_endpoint else None,
        )  # fmt: skip
        answers = Answers(
            TopTokens(model), tokenizer, found, asked.rows, jury, section.new_tokens, section.batch_rows,
            params.extract.batch_tokens, params.seed, folder,
        )  # fmt: skip
        tried = develop(answers, asked, found, targets, section.strengths)
        chosen = development.best(tried.filter(pl.col("prompts") == FIRST + SECOND), 1)
        judged = test(answers, asked, chosen, targets, corpus, prompts.Lines(tokenizer, section.prompt_tokens), params)
        removed = remove(answers, chosen, corpus, train, params)
        write(params, paths, tried, chosen, judged, removed, targets)


def hookpoints_of(params: Config) -> list[str]:
    """`steer.hookpoints`; if it is null, the hookpoint two thirds down the list of all; if it is empty, all."""
    every, chosen = params.hookpoints, params.steer.hookpoints
    return [every[round((len(every) - 1) * 2 / 3)]] if chosen is None else chosen or every


def ask(tokenizer: Any, corpus: pl.DataFrame, languages: list[str], params: Config) -> Asked:
    """The prompts: of the training split for development, held-out ones for the test, none in the target language."""
    section = params.steer
    lines = prompts.Lines(tokenizer, section.prompt_tokens, section.copies)
    rows: list[prompts.Prompt] = []
    sizes, slots = [], []
    key = "corpus.train_tokens"  # no setting changes how many are wanted for development
    if section.prompts_from is not None:
        key = "steer.prompts_from"
        corpus = prompts.split(further.read(section.prompts_from, section.prompt_languages, key))
    development = ("train", FIRST + SECOND, key)
    for split, count, key in (development, ("eval", section.prompts, "steer.prompts")):
        numbers = {}
        chosen = prompts.choose(lines, corpus.filter(split=split), section.prompt_languages, count, key)
        for language, found in chosen.items():
            numbers[language] = range(len(rows), len(rows) + len(found))
            rows += found
            sizes.append(len(found))
        by_target = {}
        for target in languages:
            others = [name for name in section.prompt_languages if name != target]
            if others:
                by_target[target] = [numbers[others[slot % len(others)]][slot // len(others)] for slot in range(count)]
        slots.append(by_target)
    return Asked(rows, sizes, *slots)


def compute(
    params: Config, paths: Paths, places: dict[str, str], rows: dict[str, torch.Tensor], codes: torch.Tensor
) -> vectors.Vectors:
    """The vectors of every method, at every place, of every language that has one."""
    section, languages = params.steer, params.languages
    features, found = read_table(paths.features), vectors.Vectors()
    ranking = paths.ablation / "ranking.parquet"
    effects = read_table(ranking) if ranking.is_file() else None
    for hookpoint, place in places.items():
        length = vectors.directions("diffmean", rows[place], codes, len(languages))
        for method in section.methods:
            if method in DENSE:
                dense = vectors.directions(method, rows[place], codes, len(languages))
                found.setdefault(method, {})[place] = dict(vectors.table(languages, vectors.as_long_as(dense, length)))
        dictionary = sae.load(paths.saes, hookpoint)
        if dictionary.W_dec.shape[1] != length.shape[1]:
            log.warning("%s: its features do not write to the residual stream, so they do not steer", hookpoint)
            continue
        activations = vectors.mean_activations(read_table(paths.counts(hookpoint)), read_table(paths.totals(hookpoint)))
        selected = vectors.ranked(features.filter(kind="sae", hookpoint=hookpoint), effects)
        for method in section.methods:
            if method == "sae-diffmean":
                table = vectors.sae_diffmean(dictionary, activations, languages)
            elif method.startswith(FEATURES):
                first = int(method.removeprefix(FEATURES).removeprefix("-") or 0) or None
                table = torch.zeros_like(length)
                for code, language in enumerate(languages):
                    units = selected.filter(language=language)["unit"].head(first or len(selected)).to_list()
                    mean = dict(activations.filter(language=language).select("unit", "mean").iter_rows())
                    if units:
                        table[code] = vectors.of_features(dictionary, units, [mean.get(unit, 0.0) for unit in units])
            else:
                continue
            found.setdefault(method, {})[hookpoint] = dict(vectors.table(languages, vectors.as_long_as(table, length)))
    if "neurons" in section.methods:
        found["neurons"] = of_neurons(params, paths, features.filter(kind="neuron"))
    return found


def of_neurons(params: Config, paths: Paths, features: pl.DataFrame) -> dict[str, dict[str, torch.Tensor]]:
    """At each of `neurons.hookpoints`, the mean activations of the language's neurons; 0 for other neurons."""
    widths = read_json(paths.neurons / "widths.json")
    totals = read_table(paths.neurons / "totals.parquet")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for hookpoint in params.neurons.hookpoints:
        activations = vectors.mean_activations(read_table(paths.neurons / f"{hookpoint}.parquet"), totals)
        chosen = features.filter(hookpoint=hookpoint).join(activations, on=["unit", "language"])
        for (language,), rows in chosen.group_by("language", maintain_order=True):
            vector = torch.zeros(widths[hookpoint])
            vector[rows["unit"].cast(pl.Int64).to_torch()] = rows["mean"].cast(pl.Float32).to_torch()
            found.setdefault(hookpoint, {})[str(language)] = vector
    return found


def develop(
    answers: Answers, asked: Asked, found: vectors.Vectors, targets: list[str], strengths: list[float]
) -> pl.DataFrame:
    """All settings that were tried, as `development.scores`; those of the second round have more `prompts`."""
    settings = [
        (method, language, place, strength)
        for method, by_place in found.items() for place, by_language in by_place.items()
        for language in by_language if language in targets for strength in strengths
    ]  # fmt: skip
    if not settings:
        return development.scores(frame([], asked.development, range(0)).with_columns(
            forced=pl.lit(True), relevant=pl.lit(True), distinct_2=pl.lit(1.0)))  # fmt: skip
    first = answers("first round", frame(settings, asked.development, range(FIRST)))
    table = development.scores(first)
    kept = development.best(table, development.KEPT)
    again = kept.select("method", "language", "place", "strength").rows()
    second = answers("second round", frame(again, asked.development, range(FIRST, FIRST + SECOND)))
    both = development.scores(pl.concat([first, second]))
    return both


def frame(settings: list[Any], slots: dict[str, list[int]], numbers: range, temperature: float = 0.0) -> pl.DataFrame:
    """The rows of `settings` (method, language, place, strength) on each language's slots `numbers`."""
    rows = [(*setting, slot, slots[setting[1]][slot], temperature) for setting in settings for slot in numbers]
    return pl.DataFrame(rows, schema=ROWS, orient="row")


def test(
    answers: Answers, asked: Asked, chosen: pl.DataFrame, targets: list[str], corpus: pl.DataFrame,
    lines: prompts.Lines, params: Config,
) -> pl.DataFrame:  # fmt: skip
    """The answers to the held-out prompts: steered, prompted by an example, and unsteered; `decoding` says which."""
    section = params.steer
    settings = chosen.select("method", "language", "place", "strength").rows()
    every, some = range(section.prompts), range(min(section.sampled, section.prompts))
    parts = [frame(settings, asked.test, every), frame(settings, asked.test, some, section.temperature)]
    steered = pl.concat(parts[: 1 if section.temperature == 0 else 2])
    unsteered = frame([(NOTHING, name, None, None) for name in targets], asked.test, every)
    # Unsteered answers are the same for all targets.
    once = unsteered.unique("prompt", keep="first", maintain_order=True)
    both = answers("test", pl.concat([steered, once]), measured(steered) + [True] * len(once))
    found = [both[: len(steered)]]
    same = both[len(steered) :].select("prompt", "text", "predicted", "relevant", "distinct_2", "nll")
    if PROMPT in section.methods:
        rows = frame([(PROMPT, name, None, None) for name in targets], asked.test, every)
        train, avoid = corpus.filter(split="train"), {prompt.group for prompt in asked.rows}
        ids = []
        for language, number in rows.select("language", "prompt").iter_rows():
            prompt = asked.rows[number]
            ids.append(lines.after(prompt, prompts.example(train, prompt.language, language, avoid)))
        found.append(answers("prompting", rows, measured(rows), ids))
    wanted = pl.col("language").replace_strict(dict(answers.judge.label), return_dtype=pl.String)
    joined = unsteered.join(same, on="prompt", how="left", maintain_order="left").with_columns(
        forced=pl.col("predicted") == wanted
    )
    # A method without a vector for a language does not steer to it.
    pairs = chosen.select("method", "language").unique()
    without = [joined.join(pairs.filter(method=method), on="language", how="anti").with_columns(method=pl.lit(method))
               for method in section.methods if method != PROMPT]  # fmt: skip
    columns = [*ROWS, "text", "predicted", "forced", "relevant", "distinct_2", "nll"]
    decoding = pl.when(pl.col("temperature") > 0).then(pl.lit("sampled")).otherwise(pl.lit("greedy"))
    asked_in = pl.col("prompt").replace_strict({n: p.language for n, p in enumerate(asked.rows)})
    text = pl.col("prompt").replace_strict(dict(enumerate(answers.judge.texts)))
    return pl.concat([part.select(columns) for part in (*found, *without, joined)]).with_columns(
        decoding=decoding, prompt_language=asked_in, prompt=text
    )


def remove(
    answers: Answers, chosen: pl.DataFrame, corpus: pl.DataFrame, train: TokenizedTexts, params: Config
) -> pl.DataFrame:
    """The table of `removal.measure`; empty if no language is removed."""
    section, language = params.steer, params.steer.removal
    if language is None:
        return pl.DataFrame(schema=removal.COLUMNS)
    lines = prompts.Lines(answers.tokenizer, section.prompt_tokens)
    held_out = corpus.filter(split="eval")
    rows = tokenize(
        answers.tokenizer, held_out["text_id"].to_list(), held_out["text"].to_list(), params.corpus.max_tokens
    )
    of = dict(held_out.select("text_id", "language").iter_rows())
    some = within([row for row in rows if row.content_tokens], of, section.tokens)
    texts = {name: [row for row in some if of[row.text_id] == name] for name in params.languages}
    # Methods without a vector have no place.
    at = [name for name in chosen["place"].unique(maintain_order=True).to_list() if name is not None]
    states, codes = (
        vectors.collect(answers.top.model, train, params.languages, at, section.tokens, params.extract.batch_tokens)
        if at else ({}, torch.zeros(0))
    )  # fmt: skip
    code, count = params.languages.index(language), len(params.languages)
    others = {place: vectors.others(vectors.means(rows, codes, count))[code] for place, rows in states.items()}
    return removal.measure(
        answers.top, answers.judge.identifier, dict(answers.judge.label), lines, corpus, language,
        removal.directions(answers.vectors, chosen, language, others), prompts=section.prompts,
        new_tokens=section.new_tokens, texts=texts, batch_tokens=params.extract.batch_tokens,
        batch_rows=section.batch_rows,
    )  # fmt: skip


def measured(rows: pl.DataFrame) -> list[bool]:
    """Of which rows the NLL is measured: greedy answers to the first prompts."""
    return rows.select((pl.col("slot") < WITH_NLL) & (pl.col("temperature") == 0)).to_series().to_list()


def write(
    params: Config, paths: Paths, tried: pl.DataFrame, chosen: pl.DataFrame, judged: pl.DataFrame,
    removed: pl.DataFrame, targets: list[str],
) -> None:  # fmt: skip
    """Write the tables, the settings beside the vectors, and the metrics; log a table of the methods."""
    section = params.steer
    methods = judged["method"].unique(maintain_order=True).to_list()
    features = statistics.pick(chosen, section.prompt_languages)
    greedy = judged.filter(decoding="greedy")
    numbers = statistics.figures(
        greedy, methods, targets, section.prompt_languages, features, slots=section.prompts,
        resamples=section.bootstrap, seed=params.seed,
    )  # fmt: skip
    sampled = statistics.figures(
        judged.filter(decoding="sampled"), methods, targets, section.prompt_languages, None,
        slots=section.prompts, resamples=0, seed=params.seed,
    )  # fmt: skip
    for key, value in sampled.items():
        head, _, method = key.partition("/")
        if head in ("harmonic", "forcing", "relevance", "distinct_2"):
            numbers[f"{head}_sampled/{method}"] = value
    inside = tried.filter(~pl.col("language").is_in(section.prompt_languages), pl.col("place").is_not_null())
    names = {vectors.place_of(name): name for name in hookpoints_of(params)}
    at_best = development.settings(inside).unique(["method", "place"], keep="first", maintain_order=True)
    for method, place, score in at_best.select("method", "place", "score").sort("method", "place").iter_rows():
        hookpoint = place if place in params.hookpoints else names.get(place, place)
        numbers[f"development/{hookpoint}/{method}"] = score
    if section.removal is not None:
        numbers |= removal.figures(removed, section.removal)
    settings: dict[str, dict[str, dict[str, Any]]] = {}
    for method, language, place, strength in chosen.select("method", "language", "place", "strength").iter_rows():
        settings.setdefault(method, {})[language] = {"hookpoint": place, "strength": strength}
    write_json(paths.vectors / "settings.json", settings)
    write_atomically(paths.steering / "development.parquet", tried.write_parquet)
    write_atomically(paths.generations, judged.write_parquet)
    write_atomically(paths.steering / "removal.parquet", removed.write_parquet)
    write_json(paths.metrics("steer"), numbers)
    keys = ("harmonic", "harmonic_low", "harmonic_high", "forcing", "relevance", "nll", "distinct_2")
    shown = [name for name in methods if f"harmonic/{name}" in numbers]
    stage.table(
        ["method", "harmonic mean", "from", "to", "forcing", "relevance", "NLL (nats/token)", "distinct-2"],
        [[name, *(f"{numbers.get(f'{key}/{name}', float('nan')):.2f}" for key in keys)] for name in shown],
    )
    if "verdict" in numbers:
        log.info(
            "%s against diffmean: %+.2f (95 %% from %+.2f to %+.2f): %s", numbers["features_method"],
            *(numbers[f"features_minus_diffmean{end}"] for end in ("", "_low", "_high")), numbers["verdict"],
        )  # fmt: skip
