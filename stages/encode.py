"""Stage `encode <hookpoint>`: how often every latent fires on every language of the training split."""

import logging
import sys
from pathlib import Path

import polars as pl

from babelscope import config, hardware, sae, stage
from babelscope.activations.counting import Counter, whole_texts
from babelscope.activations.store import ActivationStore
from babelscope.files import write_atomically, write_json
from babelscope.models.hookpoints import layer_of
from babelscope.progress import Progress

log = logging.getLogger(__name__)


def main() -> None:
    params = config.load()
    hookpoint = config.hookpoint_argument(sys.argv, params)
    device = hardware.prepare(params.hardware)
    dictionary = sae.load(Path("data/sae"), hookpoint).to(device)
    activations = ActivationStore(Path("data/activations") / hookpoint)
    table = pl.read_parquet("data/activations/tokens.parquet").filter(pl.col("split") == "train")
    language = table["language"].cast(pl.Enum(params.languages)).to_physical().cast(pl.Int64).to_torch()
    text = table["text_id"].rle_id().cast(pl.Int64).to_torch()
    rows = table["row"].to_torch()

    counter = Counter(params.languages, dictionary.W_dec.shape[0])
    active = 0
    with Progress(f"encode {hookpoint}", len(rows), "tokens") as progress:
        for start, end in whole_texts(text, params.encode.chunk_tokens):
            values, indices = dictionary.encode(activations.gather(rows[start:end]).to(device))
            counter.add(values.cpu(), indices.cpu(), language[start:end], text[start:end])
            active += int((values > 0).sum())
            progress.update(end - start)

    counts = counter.frame(layer_of(hookpoint))
    totals = (
        table.group_by("language")
        .agg(tokens=pl.len().cast(pl.Int64), texts=pl.col("text_id").n_unique().cast(pl.Int64))
        .sort(pl.col("language").cast(pl.Enum(params.languages)))
    )
    folder = Path("data/counts")
    write_atomically(folder / f"{hookpoint}.parquet", counts.write_parquet)
    write_atomically(folder / f"{hookpoint}.totals.parquet", totals.write_parquet)
    fired = counts["unit"].n_unique()
    numbers = {"tokens": len(rows), "l0": active / len(rows), "latents_fired": fired, "layer": layer_of(hookpoint)}
    write_json(Path(f"metrics/encode.{hookpoint}.json"), numbers)
    log.info("encode %s: %d tokens, %d latents fired, L0 %.1f", hookpoint, len(rows), fired, numbers["l0"])


if __name__ == "__main__":
    stage.run(main)
