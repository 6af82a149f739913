"""Stage `browse`: the tables behind the feature browser, of selected features and of those that languages share.

To be fast, it reads a part of the texts: the firing rates come from `encode`, which counted all.

The firings come from the stored activations, or from a forward pass if `train.source` is `stream`.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import torch

from babelscope import sae
from babelscope.activations.rows import read_rows
from babelscope.activations.store import opened
from babelscope.browse import tables
from babelscope.browse.effects import effects
from babelscope.browse.firings import Firings
from babelscope.browse.lens import Extremes, extremes, readable, tokens_of
from babelscope.browse.units import KEY, probabilities, units
from babelscope.config import Config
from babelscope.core import resume, stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_table, scan_table, write_atomically
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.features import sae_lape
from babelscope.features.counter import whole_texts
from babelscope.features.examples import Features, read_texts
from babelscope.models import forward, hardware, loading, logit_lens, matmul, tokens
from babelscope.models.nll import target_count
from babelscope.models.pieces import cut

log = logging.getLogger(__name__)


def run(params: Config, paths: Paths) -> None:
    """Write the tables below `paths.browse`."""
    device = hardware.prepare(params.hardware)
    features, rates = choose(params, paths)
    saes = sae.SAECache(paths.saes, features["hookpoint"].unique(maintain_order=True).to_list(), device)
    corpus, tokenizer = read_texts(paths, params.languages), loading.load_tokenizer(params.model)
    texts = part_of(corpus, paths, params.browse.train_tokens)
    firings = collectors(features, saes, params)
    if params.train.source != "stream":
        read_stored(firings, texts, params, paths)
    elif firings:
        read_passes(firings, texts, tokenizer, params, device)
    ids = texts["text_id"].to_list()
    chosen = {one.text for each in firings.values() for side in tables.SIDES for one in each.examples(side)}
    shown = texts[sorted(chosen)]
    in_pieces = cut(shown, tokens.spelled(tokenizer, shown["text"].to_list(), params.corpus.max_tokens))

    model = loading.load_model(params.model, params.ablate.dtype).to(device)
    matmul.use_in(model)
    removed = removed_alone(features, held_out_texts(corpus, params.browse.ablation_texts), params, paths)
    deltas = measure(model, tokenizer, saes, features, removed, corpus, params, paths)
    found = {
        "features": features.hstack(deltas),
        "probabilities": rates,
        "histograms": tables.histograms(features, firings),
        "texts": in_pieces.drop("piece"),
        "examples": tables.examples(features, firings, ids, in_pieces),
        "neighbours": tables.neighbours(features, saes),
        "tokens": lens(model, tokenizer, saes, features, params.browse.tokens),
    }
    for name, frame in found.items():
        write_atomically(paths.browse / f"{name}.parquet", frame.write_parquet)
    is_specific = pl.col("kind") == "specific"
    by_hookpoint = found["features"].group_by("hookpoint", maintain_order=True)
    kinds = by_hookpoint.agg(is_specific.sum(), is_specific.not_().sum().alias("shared"), pl.col("delta").count())
    stage.table(["hookpoint", "of one language", "of several", "removed alone"], kinds.rows())


def choose(params: Config, paths: Paths) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The features with `largest`, their largest activation on training texts, and their rates in every language."""
    selected = read_table(paths.features).filter(kind="sae")
    totals = read_table(paths.totals(params.hookpoints[0]))
    counts = pl.concat(
        [scan_table(paths.counts(name)).with_columns(hookpoint=pl.lit(name)) for name in params.hookpoints]
    )
    every = {"members": None, "max_entropy": None, "top": None}
    candidates = sae_lape(counts, totals, **params.score.selection | every)
    if selected.join(candidates, on=KEY, how="anti").height:
        raise UserError(
            f"{paths.features}: other features than {paths.all_counts} and params.yaml give; run `dvc repro score`"
        )
    limits = params.browse.shared, params.browse.selected
    features = units(selected, candidates, params.languages, params.hookpoints, *limits)
    own_counts = counts.join(features.lazy(), on=KEY, how="semi").collect(engine="in-memory")
    largest = own_counts.group_by(KEY).agg(largest=pl.col("max").max())
    features = features.join(largest, on=KEY, how="left", maintain_order="left")
    return features, probabilities(features, own_counts, totals)


def collectors(features: pl.DataFrame, saes: Mapping[str, Any], params: Config) -> dict[str, Firings]:
    """A collector of the firings of each hookpoint's features."""
    result = {}
    for name, dictionary in saes.items():
        rows = features.filter(hookpoint=name)
        owns = torch.tensor([[code in own for code in params.languages] for own in rows["languages"].to_list()])
        result[name] = Firings(
            Features(dictionary, rows["unit"].cast(pl.Int64).to_torch()), owns, rows["largest"].to_torch(),
            texts=params.browse.texts, longest=params.corpus.max_tokens,
        )  # fmt: skip
    return result


def part_of(corpus: pl.DataFrame, paths: Paths, train_tokens: int | None) -> pl.DataFrame:
    """The training texts to read, in the order of `corpus`: of each language the first ones by text id.

    A text id is a hash of the text, so this is a random sample. A language's last text is the one with which it reaches
    `train_tokens`; None: all texts.
    """
    train = corpus.filter(split="train")
    if train_tokens is None:
        return train
    sizes = read_rows(paths, columns=["text_id"]).group_by("text_id").len("tokens")
    sized = train.join(sizes, on="text_id", how="left", maintain_order="left").sort("text_id")
    before = (pl.col("tokens").cum_sum() - pl.col("tokens")).over("language")
    chosen = sized.filter(before < train_tokens)
    return train.join(chosen.select("text_id"), on="text_id", how="semi", maintain_order="left")


def held_out_texts(corpus: pl.DataFrame, count: int) -> dict[str, list[str]]:
    """Ids of `count` held-out texts of each language, the first ones, for `removed_alone`."""
    held_out = corpus.filter(split="eval").sort("text_id")
    first = held_out.filter(pl.int_range(pl.len()).over("language") < count)
    return dict(first.group_by("language", maintain_order=True).agg("text_id").iter_rows())


def read_stored(firings: Mapping[str, Firings], texts: pl.DataFrame, params: Config, paths: Paths) -> None:
    """Read the activations of `texts` that `extract` stored."""
    table = read_rows(paths, columns=["row", "text_id"])
    table = table.join(
        texts.select("text_id", "language").with_row_index("text"), on="text_id", how="inner", maintain_order="left"
    )
    row, text = table["row"].to_torch(), table["text"].cast(pl.Int64).to_torch()
    language = tokens.codes(table["language"], params.languages)
    with Progress("browse", len(row) * len(firings), "tokens") as progress:
        for hookpoint, collector in firings.items():
            store = opened(paths, collector.features.reads(hookpoint))
            for start, end in whole_texts(text, params.encode.chunk_tokens):
                part = slice(start, end)
                collector.add(store.gather(row[part]), text[part], language[part])
                progress.update(end - start)


def read_passes(
    firings: Mapping[str, Firings], corpus: pl.DataFrame, tokenizer: Any, params: Config, device: torch.device
) -> None:
    """Compute the activations in one forward pass, rounded as `extract` would store them."""
    texts = tokens.tokenize_corpus(tokenizer, corpus, params.corpus.max_tokens)
    language = texts.codes(params.languages)
    model = loading.load_model(params.model, params.extract.dtype).to(device)
    by_input = {collector.features.reads(name): collector for name, collector in firings.items()}
    batches, dtype = texts.batches(params.extract.batch_tokens), loading.DTYPES[params.extract.store_dtype]
    with Progress("browse", int(texts.lengths.sum()), "tokens") as progress:
        for activations, text in forward.read_batches(model, texts, batches, list(by_input), dtype):
            for name, x in activations.items():
                by_input[name].add(x, text, language[text])
            progress.update(len(text))


def lens(model: Any, tokenizer: Any, saes: Mapping[str, Any], features: pl.DataFrame, count: int) -> pl.DataFrame:
    """The tokens that each feature's direction promotes and suppresses, if it lies in the residual stream."""
    wide = [name for name in saes if saes[name].d == logit_lens.width(model)]
    for name in (name for name in saes if name not in wide):
        log.warning("%s: not as wide as the residual stream, so that its features have no logit lens", name)
    units = [features.filter(hookpoint=name)["unit"].cast(pl.Int64).to_torch() for name in wide]
    found: dict[str, Extremes] = {}
    if wide:
        has_text = tokens_of(tokenizer, model.get_output_embeddings().weight.shape[0])
        with torch.inference_mode():
            rows = [saes[name].W_dec[each.to(saes[name].b_dec.device)] for name, each in zip(wide, units, strict=True)]
            try:
                # All hookpoints together: the lens is checked once, and each product reads the whole unembedding.
                ends = extremes(logit_lens.direct_logits(model, torch.cat(rows)), count, has_text)
            except UserError as error:
                log.warning("browse: no tokens are listed: %s", error)
            else:
                parts = [torch.split(each, [len(one) for one in units]) for each in ends]
                found = {name: Extremes(*part) for name, *part in zip(wide, *parts, strict=True)}
    ids = {token for ends in found.values() for side in ends[::2] for token in side.flatten().tolist()}
    return tables.tokens(features, found, readable(tokenizer, ids))


def removed_alone(
    features: pl.DataFrame, held_out: Mapping[str, Sequence[str]], params: Config, paths: Paths
) -> list[list[str]]:
    """The ids of the texts on which each feature is removed alone.

    They are the `held_out` texts of its languages, whether it fires in them or not, so that the effects of a language's
    features can be compared; none if the feature is not among a language's top-ranked.
    """
    selected = read_table(paths.features).filter(kind="sae").sort("rank", maintain_order=True)
    first = set(selected.group_by("language", maintain_order=True).head(params.browse.ablated).select(KEY).rows())
    return [
        [text_id for language in row[-1] for text_id in held_out.get(language, [])] if row[:-1] in first else []
        for row in features.select(*KEY, "languages").iter_rows()
    ]


def measure(
    model: Any, tokenizer: Any, saes: Mapping[str, Any], features: pl.DataFrame, removed: Sequence[Sequence[str]],
    corpus: pl.DataFrame, params: Config, paths: Paths,
) -> pl.DataFrame:  # fmt: skip
    """Effects of removing each feature alone on its texts `removed`; none are measured for transcoders."""
    if any(dictionary.is_transcoder for dictionary in saes.values()):
        log.warning("browse: features are not removed one by one, since transcoders read the input of their module")
        removed = [[] for _ in removed]
    used = corpus.filter(pl.col("text_id").is_in(sorted({text_id for ids in removed for text_id in ids})))
    texts = tokens.tokenize(tokenizer, used["text_id"].to_list(), used["text"].to_list(), params.corpus.max_tokens)
    depends = params.model_dump(
        include={
            "ablate": {"batch_tokens", "dtype"},
            "extract": True,
            "hookpoints": True,
            "languages": True,
            "model": True,
        }
    )
    depends |= {"max_tokens": params.corpus.max_tokens, "texts": removed}
    with (
        resume.kept("browse", depends, [paths.texts, paths.features, paths.saes]) as folder,
        Progress("browse, one feature removed", sum(map(target_count, texts)), "tokens") as progress,
    ):
        return effects(
            model, saes, features.select("hookpoint", "unit").rows(), tokens.by_length(texts), removed,
            params.ablate.batch_tokens, keep=folder, advance=progress.update,
        )  # fmt: skip
