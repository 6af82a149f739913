"""Stage `neurons`: how often every neuron of `neurons.hookpoints` fires on every language of the training split."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from babelscope import config
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_table, scan_table, write_atomically, write_json
from babelscope.core.fingerprint import dvc_md5, fingerprint
from babelscope.core.resume import scratch

CORPUS, OUT = Path("data/corpus/texts.parquet"), Path("data/neurons")
TOTALS = {"language": pl.String, "tokens": pl.Int64, "texts": pl.Int64}
log = logging.getLogger(__name__)


def main() -> None:
    params = config.load()
    shutil.rmtree(OUT, ignore_errors=True)
    if params.neurons.hookpoints:
        count(params)
    else:
        write({}, pl.DataFrame(schema=TOTALS))
        log.info("neurons: none to count (params.yaml: neurons.hookpoints)")


def count(params: config.Config) -> None:
    """Count and write the tables; the model is loaded here only."""
    from babelscope.features import neurons
    from babelscope.models import hardware, hookpoints, loading, tokens
    from babelscope.models.text_batch import pack

    device, names = hardware.prepare(params.hardware), params.neurons.hookpoints
    skeleton = loading.load_skeleton(params.model)
    if skeleton is not None:
        hookpoints.resolve(skeleton, names, "neurons.hookpoints")
    corpus = read_table(CORPUS).filter(split="train")
    texts = pack(loading.load_tokenizer(params.model), corpus, params.corpus.max_tokens)
    if not len(texts):
        raise UserError(f"{CORPUS}: no texts of split 'train'")
    of = pl.DataFrame({"text_id": texts.text_ids, "tokens": texts.own.numpy()}).join(
        corpus.select("text_id", "language"), on="text_id", how="left", maintain_order="left"
    )  # fmt: skip
    language = of["language"].cast(pl.Enum(params.languages))
    model = loading.load_model(params.model, params.extract.dtype).to(device)
    hookpoints.resolve(model, names, "neurons.hookpoints")
    tokens.check_fits(model, texts)

    knobs = params.model_dump(include={"extract", "languages", "model"})
    knobs |= {"hookpoints": names, "max_tokens": params.corpus.max_tokens}
    keep = scratch(fingerprint("neurons", knobs, {str(CORPUS): dvc_md5(CORPUS)}))
    counters = neurons.count(
        model, texts, language.to_physical().cast(pl.Int64).to_torch(), names, params.languages,
        dtype=loading.DTYPES[params.extract.store_dtype], batch_tokens=params.extract.batch_tokens,
        checkpoint=keep / "counts.safetensors",
    )  # fmt: skip
    for name, counter in counters.items():
        write_atomically(OUT / f"{name}.parquet", counter.frame(hookpoints.layer_of(name)).write_parquet)
    totals = (
        of.group_by("language")
        .agg(pl.col("tokens").sum(), texts=pl.len().cast(pl.Int64))
        .sort(pl.col("language").cast(pl.Enum(params.languages)))
    )
    write({name: counter.units for name, counter in counters.items()}, totals)
    shutil.rmtree(keep, ignore_errors=True)
    fired = {name: scan_table(OUT / f"{name}.parquet").select(pl.col("unit").n_unique()) for name in names}
    log.info("neurons: %s tokens", f"{totals['tokens'].sum():,}")
    stage.table(["hookpoint", "neurons", "fired"],
                [[name, counters[name].units, fired[name].collect().item()] for name in names])  # fmt: skip


def write(widths: Mapping[str, int], totals: pl.DataFrame) -> None:
    """Write what holds for all hookpoints: how many neurons each has, fired or not, and the totals per language."""
    write_atomically(OUT / "totals.parquet", totals.write_parquet)
    write_json(OUT / "widths.json", widths)


if __name__ == "__main__":
    stage.run(main)
