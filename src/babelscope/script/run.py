"""Stage `script`: do features follow a language or its script? They are tried on romanised and on shuffled texts."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import torch

from babelscope import sae
from babelscope.ablation.ablate import ablate
from babelscope.ablation.interventions import FeatureAblation
from babelscope.ablation.statistics import cells
from babelscope.config import Config
from babelscope.core import resume, stage
from babelscope.core.files import read_table, write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.features.examples import Features
from babelscope.models import hardware, loading, matmul, tokens
from babelscope.models.nll import target_count
from babelscope.script import firings
from babelscope.script.texts import replaced_share, romanise, shuffle_words

VERSIONS = ("original", "romanised", "shuffled")
RATES = [*VERSIONS, "kept_romanised", "kept_shuffled"]
SCHEMA = {"hookpoint": pl.String, "unit": pl.Int32, "language": pl.String}
SCHEMA |= dict.fromkeys(RATES, pl.Float64) | {"script_bound": pl.Boolean}
NLL = {"language": pl.String, "version": pl.String, "tokens": pl.Int64, "nll": pl.Float64}
NLL |= dict.fromkeys(["delta", "low", "high"], pl.Float64)
log = logging.getLogger(__name__)


def run(params: Config, paths: Paths) -> None:
    """Write the tables below `paths.script` and the stage's metrics."""
    found, effects, numbers = pl.DataFrame(schema=SCHEMA), pl.DataFrame(schema=NLL), dict[str, float]()
    features = read_table(paths.features).filter(kind="sae").select(list(SCHEMA)[:3])
    if params.script.tokens and len(features):
        found, effects, numbers = measure(features, params, paths)
    write_atomically(paths.script / "features.parquet", found.write_parquet)
    write_atomically(paths.script / "nll.parquet", effects.write_parquet)
    write_json(paths.metrics("script"), numbers)
    report(found, effects, numbers, params.languages)


def measure(
    features: pl.DataFrame, params: Config, paths: Paths
) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, float]]:
    """The tables of `features` and of the NLLs, and the figures."""
    device = hardware.prepare(params.hardware)
    tokenizer = loading.load_tokenizer(params.model)
    corpus = sample(read_table(paths.texts).filter(split="eval"), tokenizer, params, params.script.tokens)
    saes = sae.SAECache(paths.saes, features["hookpoint"].unique(maintain_order=True).to_list(), device)
    chosen = {
        name: Features(saes[name], features.filter(hookpoint=name)["unit"].unique().sort().cast(pl.Int64).to_torch())
        for name in saes
    }
    # In the precision in which the features were found; all versions, so that they differ by their texts only.
    model = loading.load_model(params.model, params.extract.dtype).to(device)
    found = firing_rates(model, tokenizer, corpus, chosen, features, params)
    replaced = {
        str(name): replaced_share("".join(rows["text"])) for (name,), rows in corpus["original"].group_by("language")
    }
    found = firings.judged(found, replaced).select(list(SCHEMA))
    tested = [name for name in params.languages if replaced.get(name, 0.0) >= firings.REPLACED]
    is_transcoder = any(dictionary.is_transcoder for dictionary in saes.values())
    if is_transcoder:
        log.warning("script: nothing is removed, since transcoders read the input of their hookpoint's module")
    effects = pl.DataFrame(schema=NLL)
    if params.script.ablation_tokens and tested and not is_transcoder:
        if params.ablate.dtype != params.extract.dtype:
            model = loading.load_model(params.model, params.ablate.dtype).to(device)
        matmul.use_in(model)
        effects = removed(model, tokenizer, saes, features, tested, params, paths)
    return found, effects, figures(found, effects, replaced, params.languages)


def sample(corpus: pl.DataFrame, tokenizer: Any, params: Config, limit: int) -> dict[str, pl.DataFrame]:
    """By version: held-out texts of each language with about `limit` tokens as they are, `text_id`, `language`, `text`.

    No version is longer in text than the tokens of the original that the model sees (`corpus.max_tokens`).
    """
    ids = corpus["text_id"].to_list()
    ready = tokens.tokenize(tokenizer, ids, corpus["text"].to_list(), params.corpus.max_tokens)
    language = dict(zip(ids, corpus["language"], strict=True))
    kept = [text.text_id for text in tokens.within(ready, language, limit)]
    chosen = corpus.filter(pl.col("text_id").is_in(kept)).select("text_id", "language", "text")
    spans = tokens.spelled(tokenizer, chosen["text"].to_list(), params.corpus.max_tokens)
    cut = [text[: ends[-1][1]] if ends else text for text, ends in spans]
    shuffled = [shuffle_words(text, name, params.seed) for text, name in zip(cut, chosen["text_id"], strict=True)]
    written = {"original": cut, "romanised": [romanise(text) for text in cut], "shuffled": shuffled}
    return {version: chosen.with_columns(text=pl.Series(texts, dtype=pl.String)) for version, texts in written.items()}


def firing_rates(
    model: Any, tokenizer: Any, corpus: Mapping[str, pl.DataFrame], chosen: Mapping[str, Features],
    features: pl.DataFrame, params: Config,
) -> pl.DataFrame:  # fmt: skip
    """`features` with each version's rate, the share of their language's tokens on which they fire."""
    language = tokens.codes(corpus["original"]["language"], params.languages)
    found = original = firings.nothing(len(language), chosen)
    for version, frame in corpus.items():
        # Texts that are the same as the original fire as it does. Of romanised texts, which have more tokens, all
        # tokens are used: the same text is compared.
        is_new = pl.lit(True) if version == "original" else frame["text"] != corpus["original"]["text"]
        texts = tokens.tokenize_corpus(tokenizer, frame.with_row_index("index").filter(is_new), 2**31)
        tokens.check_fits(model, texts)
        dtype = loading.DTYPES[params.extract.store_dtype]
        found = firings.count(original, model, texts, chosen, dtype, params.extract.batch_tokens)
        original = found if version == "original" else original
        parts = []
        for (name,), rows in features.group_by("hookpoint", maintain_order=True):
            column = rows["unit"].unique().sort().search_sorted(rows["unit"]).cast(pl.Int64).to_torch()
            owns = tokens.codes(rows["language"], params.languages)
            rate = firings.rates(found.fired[str(name)][:, column], found.tokens, language, owns)
            parts.append(rows.with_columns(pl.Series(version, rate.numpy()).fill_nan(None)))
        features = pl.concat(parts)
    return features


def removed(
    model: Any, tokenizer: Any, saes: Any, features: pl.DataFrame, languages: Sequence[str], params: Config,
    paths: Paths,
) -> pl.DataFrame:  # fmt: skip
    """The NLL of the texts of `languages` as they are and romanised, and its change without the language's features."""
    corpus = read_table(paths.texts).filter(pl.col("language").is_in(languages), split="eval")
    versions = sample(corpus, tokenizer, params, params.script.ablation_tokens)
    units = {
        name: [features.filter(hookpoint=name, language=language)["unit"].to_list() for language in languages]
        for name in saes
    }
    interventions = {name: FeatureAblation(saes[name], sets) for name, sets in units.items()}
    depends = params.model_dump(include={"languages", "model", "script", "seed"})
    depends |= {"max_tokens": params.corpus.max_tokens, "batch": params.ablate.batch_tokens}
    depends |= {"dtype": params.ablate.dtype}
    parts = []
    with resume.kept("script", depends, [paths.texts, paths.features, paths.saes]) as folder:
        for version in ("original", "romanised"):
            texts, language = tokens.texts_of(versions[version], tokenizer, None, 2**31)
            asked = torch.tensor([[name == one for one in language] for name in languages])
            with Progress(f"script, {version}", sum(map(target_count, texts)), "tokens") as progress:
                nll = ablate(
                    model, interventions, texts, params.ablate.batch_tokens,
                    asked=asked, keep=folder / version, advance=progress.update,
                )  # fmt: skip
            found = cells(
                nll.clean.numpy(), nll.ablated.numpy(), nll.tokens.numpy(), language, params.ablate.bootstrap,
                params.seed,
            )  # fmt: skip
            own = found.filter(pl.col("condition") >= 0).with_columns(version=pl.lit(version))
            parts.append(own.sort(pl.col("evaluated").cast(pl.Enum(languages))).rename({"evaluated": "language"}))
    # `nll` is that without the features; the table has the clean one.
    return (
        pl.concat(parts)
        .with_columns(nll=pl.col("nll") - pl.col("delta"))
        .select(pl.col(name).cast(dtype) for name, dtype in NLL.items())
    )


def figures(
    found: pl.DataFrame, effects: pl.DataFrame, replaced: Mapping[str, float], languages: Sequence[str]
) -> dict[str, float]:
    """Flat key figures.

    `tested`, `script_bound`: numbers of features with a verdict, and of those that are script-bound. Per language and
    (means over the languages) in all: `still_romanised`, `still_shuffled`, the share of the features that still fire.
    Per language: `script_bound_share`, `replaced` (share of letters that romanising replaces), `own_original` and
    `own_romanised` (change of the NLL without the language's features, nats/token).
    """
    numbers: dict[str, float] = {f"replaced/{name}": replaced[name] for name in languages if name in replaced}
    units = found.drop_nulls("script_bound").group_by("hookpoint", "unit").agg(pl.col("script_bound").all())
    numbers |= {"tested": len(units), "script_bound": int(units["script_bound"].sum())}
    shares = {
        "still_romanised": pl.col("kept_romanised") >= firings.STILL,
        "still_shuffled": pl.col("kept_shuffled") >= firings.STILL,
        "script_bound_share": pl.col("script_bound"),
    }
    for key, column in shares.items():
        known = dict(found.group_by("language").agg(column.mean()).drop_nulls().iter_rows())
        by_language = {name: known[name] for name in languages if name in known}
        numbers |= {f"{key}/{name}": value for name, value in by_language.items()}
        if by_language:
            numbers[key] = math.fsum(by_language.values()) / len(by_language)
    for language, version, delta in effects.select("language", "version", "delta").iter_rows():
        numbers[f"own_{version}/{language}"] = delta
    return numbers


def report(found: pl.DataFrame, effects: pl.DataFrame, numbers: Mapping[str, float], languages: Sequence[str]) -> None:
    """Log a line per language with features, and the number of script-bound features."""
    if found.is_empty():
        log.info("script: nothing to compare (params.yaml: script.tokens, or no features)")
        return
    rows = []
    for name in languages:
        own = found.filter(language=name)
        if len(own):
            shares = [numbers.get(f"{key}/{name}") for key in ("replaced", "still_romanised", "still_shuffled")]
            deltas = [numbers.get(f"own_{version}/{name}") for version in ("original", "romanised")]
            bound = own["script_bound"]
            shown = "-" if bound.is_null().all() else str(bound.sum())
            cells_ = [*(f"{100 * x:.0f} %" if x is not None else "-" for x in shares), shown]
            rows.append([name, len(own), *cells_, *(f"{x:+.3f}" if x is not None else "-" for x in deltas)])
    head = ["language", "features", "letters replaced", "still fire romanised", "shuffled", "script-bound"]
    stage.table([*head, "own dNLL", "romanised"], rows)
    log.info("script-bound: %d of %d features with a verdict", numbers["script_bound"], numbers["tested"])
