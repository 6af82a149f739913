"""Stage `neurons`: how often every neuron of `neurons.hookpoints` fires on every language of the training split."""

import logging
import shutil
from collections.abc import Mapping

import polars as pl

from babelscope.config import Config
from babelscope.core import resume, stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_table, write_atomically, write_json
from babelscope.core.paths import Paths

log = logging.getLogger(__name__)


def run(params: Config, paths: Paths) -> None:
    """Write counts per hookpoint, totals and widths to `paths.neurons`; the latter two are empty without hookpoints."""
    shutil.rmtree(paths.neurons, ignore_errors=True)
    if params.neurons.hookpoints:
        count(params, paths)
    else:
        write(paths, {}, pl.DataFrame(schema={"language": pl.String, "tokens": pl.Int64, "texts": pl.Int64}))
        log.info("neurons: none to count (params.yaml: neurons.hookpoints)")


def count(params: Config, paths: Paths) -> None:
    """Count and write the tables."""
    # Imported here: they take seconds, and by default no neurons are counted.
    from babelscope.features import counter, neurons
    from babelscope.models import hardware, hookpoints, loading, tokens

    device, names = hardware.prepare(params.hardware), params.neurons.hookpoints
    loading.check_hookpoints(params.model, names, "neurons.hookpoints")
    corpus = read_table(paths.texts).filter(split="train")
    texts = tokens.tokenize_corpus(loading.load_tokenizer(params.model), corpus, params.corpus.max_tokens)
    if not len(texts):
        raise UserError(f"{paths.texts}: no texts of split 'train'")
    model = loading.load_model(params.model, params.extract.dtype).to(device)
    hookpoints.resolve(model, names, "neurons.hookpoints")
    tokens.check_fits(model, texts)

    depends = params.model_dump(include={"extract", "languages", "model"})
    depends |= {"hookpoints": names, "max_tokens": params.corpus.max_tokens}
    totals, found = counter.totals(texts.frame, params.languages), []
    with resume.kept("neurons", depends, [paths.texts]) as folder:
        counters = neurons.count(
            model, texts, names, params.languages, dtype=loading.DTYPES[params.extract.store_dtype],
            batch_tokens=params.extract.batch_tokens, checkpoint=folder / "counts.safetensors",
        )  # fmt: skip
        for name, firings in counters.items():
            frame = firings.frame(hookpoints.layer_of(name))
            write_atomically(paths.neurons / f"{name}.parquet", frame.write_parquet)
            found.append([name, firings.units, frame["unit"].n_unique()])
        write(paths, {name: firings.units for name, firings in counters.items()}, totals)
    log.info("neurons: %s tokens", f"{totals['tokens'].sum():,}")
    stage.table(["hookpoint", "neurons", "fired"], found)


def write(paths: Paths, widths: Mapping[str, int], totals: pl.DataFrame) -> None:
    """Write the number of neurons of every hookpoint, fired or not, and the totals per language."""
    write_atomically(paths.neurons / "totals.parquet", totals.write_parquet)
    write_json(paths.neurons / "widths.json", widths)
