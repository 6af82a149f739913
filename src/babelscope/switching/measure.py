"""What a language's features do where a sentence switches to it, and what removing them does there."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from babelscope import sae
from babelscope.ablation.ablate import ablate
from babelscope.ablation.interventions import FeatureAblation
from babelscope.ablation.statistics import ENOUGH, means
from babelscope.config import Config
from babelscope.core import resume
from babelscope.core.errors import UserError
from babelscope.core.files import read_table
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.features.sharing import parallel_texts
from babelscope.models import forward, hardware, loading, matmul, tokens
from babelscope.models.names import layer_of
from babelscope.models.nll import target_count
from babelscope.switching import sentences
from babelscope.switching.schemas import CHANGES, PAIR_SCHEMA, POSITION_SCHEMA

log = logging.getLogger(__name__)


def measure(
    features: pl.DataFrame, params: Config, paths: Paths
) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, float]]:
    """The tables of pairs and of positions, and the figures; languages without `features` are left out."""
    device = hardware.prepare(params.hardware)
    tokenizer = loading.load_tokenizer(params.model)
    languages = [name for name in params.languages if name in set(features["language"])]
    texts = made(tokenizer, languages, params, paths)
    model = loading.load_model(params.model, params.ablate.dtype).to(device)
    matmul.use_in(model)
    tokens.check_fits(model, texts)
    saes = sae.SAECache(paths.saes, features["hookpoint"].unique(maintain_order=True).to_list(), device)
    positions = preactivations(model, saes, texts, features, languages, params, paths)
    if any(dictionary.is_transcoder for dictionary in saes.values()):
        log.warning("switching: nothing is removed, since transcoders read the input of their hookpoint's module")
        pairs = pl.DataFrame(schema=PAIR_SCHEMA)
    else:
        units = {
            name: [features.filter(hookpoint=name, language=one)["unit"].to_list() for one in languages]
            for name in saes
        }
        nll = removed(model, {name: FeatureAblation(saes[name], sets) for name, sets in units.items()}, texts,
                      languages, params, paths)  # fmt: skip
        pairs = changes(texts.frame, *nll, languages, params.ablate.bootstrap, params.seed)
    return pairs, positions, figures(pairs, positions, texts.frame)


def made(tokenizer: Any, languages: list[str], params: Config, paths: Paths) -> tokens.TokenizedTexts:
    """The sentences of `sentences.join`, from held-out texts of the parallel groups in most languages.

    Raises
    ------
    UserError: no held-out text that is long enough has a translation.
    """
    corpus = read_table(paths.texts).filter(pl.col("language").is_in(languages), split="eval")
    spelled = tokens.spelled(tokenizer, corpus["text"].to_list(), params.corpus.max_tokens)
    points = pl.Series("switch", [sentences.switch_point(*one) for one in spelled], dtype=pl.Int64)
    corpus = corpus.with_columns(points).drop_nulls("switch")
    chosen = parallel_texts(corpus, languages, params.switching.groups)
    if chosen.is_empty():
        least = sentences.BEFORE + sentences.AFTER
        raise UserError(
            f"params.yaml: switching.groups: {paths.texts} has no held-out text of at least {least} tokens in two "
            "languages (translations of each other share a `group`); set it to 0"
        )
    parts = chosen.join(corpus.select("text_id", "text", "switch"), on="text_id", maintain_order="left")
    cut = tokens.tokenize_corpus(tokenizer, parts, params.corpus.max_tokens)
    return tokens.TokenizedTexts(sentences.join(cut.frame), cut.special)


@torch.no_grad()
def preactivations(
    model: Any, saes: Any, texts: tokens.TokenizedTexts, features: pl.DataFrame, languages: list[str], params: Config,
    paths: Paths,
) -> pl.DataFrame:  # fmt: skip
    """The rows of `POSITION_SCHEMA`: means over the sentences of a pair, those of a language with itself among them.

    The mean pre-activation of a language's features is a linear function of the activations: the mean of the features'
    encoder rows and biases, each divided by the feature's mean activation (see `directions`).
    """
    first, second = (tokens.codes(texts.frame[name], languages) for name in ("language", "other"))
    switch, pair = texts.frame["switch"].to_torch(), first * len(languages) + second
    weights = {name: directions(saes.get_sae(name), name, features, languages, paths) for name in saes}
    names = {saes[name].input_name(name): name for name in saes}
    cells = len(languages) ** 2, len(sentences.POSITIONS)
    sums = {name: torch.zeros(cells[0] * cells[1], 2, dtype=torch.float64) for name in saes}
    dtype = loading.DTYPES[params.ablate.dtype]
    with Progress("switching, pre-activations", int(texts.lengths.sum()), "tokens") as progress:
        for rows in forward.read_batches(model, texts, texts.batches(params.ablate.batch_tokens), list(names), dtype):
            number = rows.text
            lengths = torch.unique_consecutive(number, return_counts=True)[1]
            start = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
            position = torch.arange(len(number)) - start - switch[number] + sentences.BEFORE
            near = (position >= 0).nonzero().squeeze(1)
            number, index = number[near], pair[number[near]] * cells[1] + position[near]
            for read, x in rows.activations.items():
                weight, bias = weights[names[read]]
                found = (saes.get_sae(names[read]).centre(x[near.to(x.device)]) @ weight.T + bias).cpu().double()
                both = found.gather(1, torch.stack([first[number], second[number]], dim=1))
                sums[names[read]].index_add_(0, index, both)
            progress.update(len(rows.text))
    count = torch.bincount(pair, minlength=cells[0]).repeat_interleave(cells[1])
    grid = pl.DataFrame({"language": languages}).join(pl.DataFrame({"other": languages}), how="cross")
    grid = grid.join(pl.DataFrame({"position": sentences.POSITIONS}), how="cross", maintain_order="left_right")
    parts = [pl.DataFrame(schema=POSITION_SCHEMA)]
    for name, table in sums.items():
        values = (table / count.unsqueeze(1)).numpy()
        found = grid.with_columns(
            hookpoint=pl.lit(name), layer=layer_of(name), host=values[:, 0], intruder=values[:, 1]
        )
        found = found.with_columns(pl.col("host", "intruder").fill_nan(None))
        parts.append(
            found.filter((count > 0).numpy()).select(pl.col(key).cast(to) for key, to in POSITION_SCHEMA.items())
        )
    return pl.concat(parts)


def directions(
    dictionary: Any, hookpoint: str, features: pl.DataFrame, languages: list[str], paths: Paths
) -> tuple[Tensor, Tensor]:
    """Weight `[languages, d_in]` and bias `[languages]` of the mean pre-activation of each language's features.

    A pre-activation, `w x + b`, is divided by the feature's mean activation on those training tokens of its language on
    which it fires, so that features of all layers have the same scale. A language without features here has nan.
    """
    counts = read_table(paths.counts(hookpoint)).select("unit", "language", scale=pl.col("sum") / pl.col("tokens"))
    rows = features.filter(hookpoint=hookpoint).join(counts, on=["unit", "language"], maintain_order="left")
    code, unit = tokens.codes(rows["language"], languages), rows["unit"].cast(pl.Int64).to_torch()
    count = torch.bincount(code, minlength=len(languages)).float()
    scale = 1 / (rows["scale"].cast(pl.Float32).to_torch() * count[code])
    device = dictionary.encoder.device
    mean = torch.zeros(len(languages), len(rows)).index_put_((code, torch.arange(len(rows))), scale).to(device)
    empty = torch.where(count > 0, 0.0, torch.nan).to(device)
    return mean @ dictionary.encoder[unit] + empty.unsqueeze(1), mean @ dictionary.b_enc[unit] + empty


def removed(
    model: Any, interventions: Mapping[str, FeatureAblation], texts: tokens.TokenizedTexts, languages: list[str],
    params: Config, paths: Paths,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The NLL at the switch in nats: clean `[texts]`, and without each language's features `[languages, texts]`.

    They are removed from the last token of the first part on, since that token predicts the first one of the second
    part; texts and their contexts before that are unchanged. Each sentence is measured without the features of both of
    its languages, and one that does not switch without those of every language. The NLL is that of the second part and
    of that last token, whose own NLL no removal changes.
    """
    cut = dict(texts.frame.select("text_id", pl.col("switch") - 1 + len(texts.special)).iter_rows())
    ready = tokens.by_length([dataclasses.replace(text, special=cut[text.text_id]) for text in texts])
    number = {text_id: row for row, text_id in enumerate(texts.frame["text_id"])}
    order = torch.tensor([number[text.text_id] for text in ready])
    first, second = (tokens.codes(texts.frame[name], languages)[order] for name in ("language", "other"))
    condition = torch.arange(len(languages)).unsqueeze(1)
    asked = (condition == first) | (condition == second) | (first == second)
    depends = params.model_dump(include={"model": True, "switching": True, "ablate": {"batch_tokens", "dtype"}})
    depends |= {"languages": languages, "max_tokens": params.corpus.max_tokens}
    with (
        resume.kept("switching", depends, [paths.texts, paths.features, paths.saes]) as folder,
        Progress("switching, features removed", sum(map(target_count, ready)), "tokens") as progress,
    ):
        found = ablate(model, interventions, ready, params.ablate.batch_tokens, asked=asked, keep=folder,
                       advance=progress.update)  # fmt: skip
    back = order.argsort()
    return found.clean[back], found.ablated[:, back]


def changes(
    frame: pl.DataFrame, nll: Tensor, without: Tensor, languages: list[str], resamples: int, seed: int
) -> pl.DataFrame:
    """The rows of `PAIR_SCHEMA`, each a language and another one to which sentences switch.

    With parallel texts of parts a1 a2 and b1 b2, all in nats per token of the second part, means over the groups:

    - `cost`: NLL(b2 | a1) - NLL(a2 | a1), by how much the switch is less probable than staying;
    - `switched`, `stayed`: change of NLL(b2 | a1) and of NLL(a2 | a1) without the features of b's language;
    - `effect`: their difference, the change of `cost`, with a 95 % interval over the groups (null: fewer than
      `ENOUGH`);
    - `host`: change of NLL(b2 | a1) without the features of a's language;
    - `alone`: change of NLL(b2 | b1) without the features of b's language, if nothing switches.

    Parameters
    ----------
    frame: `group`, `language`, `other` of each text.
    nll, without: of each text, see `removed`; `without` may be nan where a change is not needed.
    resamples, seed: of the bootstrap over the groups.
    """
    count = len(languages)
    group = frame["group"].rank("dense").cast(pl.Int64).to_numpy() - 1
    first, second = (tokens.codes(frame[name], languages).numpy() for name in ("language", "other"))
    clean = np.full((group.max() + 1, count, count), np.nan)
    change = np.full((count, *clean.shape), np.nan)
    clean[group, first, second] = nll.numpy()
    change[:, group, first, second] = (without - nll).numpy()
    rows = []
    for a, b in ((a, b) for a in range(count) for b in range(count) if a != b):
        known = np.flatnonzero(~np.isnan(clean[:, a, b]))
        if not len(known):
            continue
        here, switched, stayed = clean[known], change[b, known, a, b], change[b, known, a, a]
        values = np.stack([
            here[:, a, b] - here[:, a, a], switched, stayed, switched - stayed,
            change[a, known, a, b], change[b, known, b, b],
        ])  # fmt: skip
        size = np.full(len(known), sentences.AFTER)
        mean, resampled = means(values, size, resamples, np.random.default_rng([seed, a, b]))
        effect = resampled[CHANGES.index("effect")]
        interval = np.quantile(effect, [0.025, 0.975]).tolist() if len(known) >= ENOUGH else (None, None)
        rows.append((languages[a], languages[b], len(known), *mean.tolist(), *interval))
    return pl.DataFrame(rows, schema=PAIR_SCHEMA, orient="row")


def figures(pairs: pl.DataFrame, positions: pl.DataFrame, frame: pl.DataFrame) -> dict[str, float]:
    """Flat key figures.

    `groups`, `texts`, `pairs`; means over the pairs of languages of the columns of `changes`, and `effect/<language>`
    (switches to that language); `pairs_above`: pairs whose interval of `effect` is above 0. Mean pre-activations over
    the pairs and hookpoints: `host_before`, `host_after`, `intruder_before`, `intruder_after` the switch, and
    `intruder_alone`, as after the switch, but in the language's own text.
    """
    numbers: dict[str, float | None] = {"groups": frame["group"].n_unique(), "texts": len(frame)}
    if len(pairs):
        numbers |= {"pairs": len(pairs), "pairs_above": int((pairs["effect_low"] > 0).sum())}
        numbers |= pairs.select(pl.col(CHANGES).mean()).row(0, named=True)
        by_language = pairs.group_by("other", maintain_order=True).agg(pl.col("effect").mean())
        numbers |= {f"effect/{name}": value for name, value in by_language.iter_rows()}
    is_after, is_alone = pl.col("position") >= 0, pl.col("language") == pl.col("other")
    parts = {"before": ~is_after & ~is_alone, "after": is_after & ~is_alone, "alone": is_after & is_alone}
    for name, rows in parts.items():
        found = positions.filter(rows).select(pl.col("host", "intruder").mean()).row(0, named=True)
        numbers |= {f"{key}_{name}": value for key, value in found.items() if (key, name) != ("host", "alone")}
    return {key: value for key, value in numbers.items() if value is not None and math.isfinite(value)}
