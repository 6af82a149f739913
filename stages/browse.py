"""Stage `browse`: what the feature browser shows of every selected feature, and of those that several languages share.

From the stored activations, or from one forward pass where `train.source` is `stream`.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from babelscope import config
from babelscope.browse.units import KEY, probabilities, units
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_table, scan_table, scratch, write_atomically
from babelscope.core.fingerprint import dvc_md5, fingerprint
from babelscope.core.progress import Progress
from babelscope.features import sae_lape

CORPUS, FEATURES, SAES = Path("data/corpus/texts.parquet"), Path("data/scores/features.parquet"), Path("data/sae")
ACTIVATIONS, COUNTS, OUT = Path("data/activations"), Path("data/counts"), Path("data/browse")
TOKENS = ACTIVATIONS / "tokens.parquet"
log = logging.getLogger(__name__)


def main() -> None:
    params = config.load()
    features, rates = choose(params)
    from babelscope import sae
    from babelscope.browse import tables
    from babelscope.models import hardware, loading, matmul, tokens

    device = hardware.prepare(params.hardware)
    saes = sae.SAECache(SAES, features["hookpoint"].unique(maintain_order=True).to_list(), device)
    texts = read_texts()
    tokenizer = loading.load_tokenizer(params.model)
    firings = collectors(features, saes, params)
    if params.train.source != "stream":
        read_stored(firings, params)
    else:
        read_passes(firings, texts, tokenizer, params, device)
    ids = texts["text_id"].to_list()
    shown = {one.text for some in firings.values() for side in ("own", "other") for one in some.examples(side)}
    some = texts[sorted(shown)]
    in_pieces = tables.cut(some, tokens.spelled(tokenizer, some["text"].to_list(), params.corpus.max_tokens))

    model = loading.load_model(params.model, params.ablate.dtype).to(device)
    matmul.use_in(model)
    found = {
        "probabilities": rates,
        "histograms": tables.histograms(features, firings),
        "texts": in_pieces.drop("piece"),
        "examples": tables.examples(features, firings, ids, in_pieces),
        "tokens": lens(model, tokenizer, saes, features, params.browse.tokens),
    }
    del in_pieces
    held_out = [[ids[number] for number in some] for one in firings.values() for some in one.texts("held_out")]
    first = first_of_each(params.browse.ablated)
    held_out = [some if key in first else [] for key, some in zip(features.select(KEY).rows(), held_out, strict=True)]
    found["features"] = features.hstack(measure(model, tokenizer, saes, features, held_out, texts, params))
    for name, frame in found.items():
        write_atomically(OUT / f"{name}.parquet", frame.write_parquet)
    is_specific = pl.col("kind") == "specific"
    by_hookpoint = found["features"].group_by("hookpoint", maintain_order=True)
    kinds = by_hookpoint.agg(is_specific.sum(), is_specific.not_().sum().alias("shared"), pl.col("delta").count())
    stage.table(["hookpoint", "of one language", "of several", "removed alone"], kinds.rows())


def choose(params: config.Config) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The features with `largest`, the largest activation on the training texts, and their rates in every language."""
    selected = read_table(FEATURES).filter(kind="sae")
    totals = read_table(COUNTS / f"{params.hookpoints[0]}.totals.parquet")
    counts = pl.concat(
        [scan_table(COUNTS / f"{name}.parquet").with_columns(hookpoint=pl.lit(name)) for name in params.hookpoints]
    )
    candidates = sae_lape(counts, totals, **params.score.model_dump() | {"members": None, "top": None})
    features = units(selected, candidates, params.languages, params.hookpoints, params.browse.shared)
    if selected.join(features, on=KEY, how="anti").height:
        raise UserError(f"{FEATURES}: other features than {COUNTS} and params.yaml give; run `dvc repro score`")
    mine = counts.join(features.lazy(), on=KEY, how="semi").collect(engine="in-memory")
    largest = mine.group_by(KEY).agg(largest=pl.col("max").max())
    features = features.join(largest, on=KEY, how="left", maintain_order="left")
    return features, probabilities(features, mine, totals)


def first_of_each(count: int) -> set[tuple[Any, ...]]:
    """`KEY` of the first features in rank of each language."""
    selected = read_table(FEATURES).filter(kind="sae").sort("rank", maintain_order=True)
    return set(selected.group_by("language", maintain_order=True).head(count).select(KEY).rows())


def read_texts() -> pl.DataFrame:
    """`text_id`, `language`, `split`, `text`, in the order in which their activations lie."""
    table = read_table(TOKENS, columns=["text_id"]).unique(maintain_order=True)
    texts = table.join(read_table(CORPUS), on="text_id", how="left", maintain_order="left")
    if texts["text"].null_count():
        raise UserError(f"{TOKENS}: holds texts that {CORPUS} lacks; run `dvc repro extract`")
    return texts.select("text_id", "language", "split", "text")


def collectors(features: pl.DataFrame, saes: Mapping[str, Any], params: config.Config) -> dict[str, Any]:
    """By hookpoint, what collects the firings of its features."""
    import torch

    from babelscope.features.examples import Firings

    result = {}
    for name, dictionary in saes.items():
        here = features.filter(hookpoint=name)
        owns = [[language in own for language in params.languages] for own in here["languages"].to_list()]
        result[name] = Firings(
            dictionary, here["unit"].cast(pl.Int64).to_torch(), torch.tensor(owns), here["largest"].to_torch(),
            texts=params.browse.texts, held_out=params.browse.ablation_texts, longest=params.corpus.max_tokens,
        )  # fmt: skip
    return result


def read_stored(firings: Mapping[str, Any], params: config.Config) -> None:
    """Read the activations that `extract` stored."""
    from babelscope.activations.store import ActivationStore, place
    from babelscope.features.counter import whole_texts

    table = read_table(TOKENS, columns=["row", "text_id", "language", "split"])
    row, text = table["row"].to_torch(), table["text_id"].rle_id().cast(pl.Int64).to_torch()
    language = table["language"].cast(pl.Enum(params.languages)).to_physical().cast(pl.Int64).to_torch()
    is_held_out = (table["split"] == "eval").to_torch()
    with Progress("browse", len(row) * len(firings), "tokens") as progress:
        for hookpoint, collector in firings.items():
            store = ActivationStore(place(ACTIVATIONS, read_at(hookpoint, collector)))
            for start, end in whole_texts(text, params.encode.chunk_tokens):
                part = slice(start, end)
                collector.add(store.gather(row[part]), text[part], language[part], is_held_out[part])
                progress.update(end - start)


def read_passes(
    firings: Mapping[str, Any], texts: pl.DataFrame, tokenizer: Any, params: config.Config, device: Any
) -> None:
    """Compute the activations in one forward pass, rounded as `extract` would store them."""
    if not firings:
        return
    import torch

    from babelscope.models import forward, loading, tokens

    language = texts["language"].cast(pl.Enum(params.languages)).to_physical().cast(pl.Int64).to_torch()
    is_held_out = (texts["split"] == "eval").to_torch()
    tokenized = tokens.tokenize(
        tokenizer, texts["text_id"].to_list(), texts["text"].to_list(), params.corpus.max_tokens
    )
    model = loading.load_model(params.model, params.extract.dtype).to(device)
    store_dtype = loading.DTYPES[params.extract.store_dtype]
    names = {read_at(name, collector): collector for name, collector in firings.items()}
    first = 0
    with Progress("browse", sum(text.own for text in tokenized), "tokens") as progress:
        for batch in tokens.batches(tokenized, params.extract.batch_tokens):
            own = torch.tensor([text.own for text in batch])
            text = torch.arange(first, first + len(batch)).repeat_interleave(own)
            first += len(batch)
            padded, mask, own_mask = (part.to(device) for part in forward.collate(batch))
            with torch.inference_mode():
                seen = forward.own_activations(model, list(names), (padded, mask, own_mask), store_dtype)
                for name, x in seen.items():
                    names[name].add(x, text, language[text], is_held_out[text])
            progress.update(len(text))


def read_at(hookpoint: str, collector: Any) -> str:
    """What a collector's SAE encodes: the hookpoint, or what enters its module (transcoders)."""
    return str(collector.sae.input_name(hookpoint))


def lens(model: Any, tokenizer: Any, saes: Mapping[str, Any], features: pl.DataFrame, count: int) -> pl.DataFrame:
    """The tokens that each feature's direction promotes and suppresses, where it lies in the residual stream."""
    import torch

    from babelscope.browse import tables
    from babelscope.browse.lens import extremes, readable, tokens_of
    from babelscope.models import logit_lens

    found = {}
    has_text = tokens_of(tokenizer, model.get_output_embeddings().weight.shape[0])
    with torch.inference_mode():
        for name, dictionary in saes.items():
            if dictionary.d != logit_lens.width(model):
                log.warning("%s: not as wide as the residual stream, so its features have no logit lens", name)
                continue
            chosen = features.filter(hookpoint=name)["unit"].cast(pl.Int64).to_torch()
            directions = dictionary.W_dec[chosen.to(dictionary.b_dec.device)]
            try:
                found[name] = extremes(logit_lens.direct_logits(model, directions), count, has_text)
            except UserError as error:
                log.warning("browse: no tokens are listed: %s", error)
                break
    ids = {
        token
        for ends in found.values()
        for some in (ends.promoted, ends.suppressed)
        for token in some.flatten().tolist()
    }
    return tables.tokens(features, found, readable(tokenizer, ids))


def measure(
    model: Any,
    tokenizer: Any,
    saes: Mapping[str, Any],
    features: pl.DataFrame,
    held_out: list[list[str]],
    texts: pl.DataFrame,
    params: config.Config,
) -> pl.DataFrame:
    """What taking out each feature alone does to its texts `held_out`; nothing is measured for transcoders."""
    from babelscope.browse.effects import effects
    from babelscope.models import tokens

    if any(dictionary.b_in is not None for dictionary in saes.values()):
        log.warning("browse: transcoders read their module's input, so no feature is removed by itself")
        held_out = [[] for _ in held_out]
    used = texts.filter(pl.col("text_id").is_in(sorted({one for some in held_out for one in some})))
    tokenized = tokens.tokenize(tokenizer, used["text_id"].to_list(), used["text"].to_list(), params.corpus.max_tokens)
    knobs = params.model_dump(
        include={
            "ablate": {"batch_tokens", "dtype"},
            "extract": True,
            "hookpoints": True,
            "languages": True,
            "model": True,
        }
    )
    knobs |= {"max_tokens": params.corpus.max_tokens, "texts": held_out}
    keep = scratch(fingerprint("browse", knobs, {str(path): dvc_md5(path) for path in (CORPUS, FEATURES, SAES)}))
    targets = sum(max(len(text.ids) - max(text.special, 1), 0) for text in tokenized)
    with Progress("browse, one feature removed", targets, "tokens") as progress:
        found = effects(
            model, saes, features.select("hookpoint", "unit").rows(), tokens.by_length(tokenized), held_out,
            params.ablate.batch_tokens, keep=keep, advance=progress.update,
        )  # fmt: skip
    shutil.rmtree(keep, ignore_errors=True)
    return found


if __name__ == "__main__":
    stage.run(main)
