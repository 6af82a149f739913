"""Stage `ablate`: remove each language's features and measure the NLL of every language on held-out text."""

import logging
import shutil
from pathlib import Path
from typing import Any

import polars as pl

from babelscope import config, stage
from babelscope.files import scratch, write_atomically, write_json
from babelscope.fingerprint import dvc_md5, fingerprint
from babelscope.progress import Progress

CORPUS, FEATURES = Path("data/corpus/texts.parquet"), Path("data/scores/features.parquet")
FOLDER = Path("data/ablation")
log = logging.getLogger(__name__)


def main() -> None:
    params = config.load()
    import torch

    from babelscope import hardware, matmul, sae
    from babelscope.evaluation import ablation, selectivity
    from babelscope.models import hookpoints, loading, tokens

    device = hardware.prepare(params.hardware)
    features = pl.read_parquet(FEATURES).filter(kind="sae")
    corpus = pl.read_parquet(CORPUS).filter(split="eval")
    tokenizer = loading.load_tokenizer(params.model)
    texts = tokens.by_length(
        tokens.tokenize(tokenizer, corpus["text_id"].to_list(), corpus["text"].to_list(), params.corpus.max_tokens)
    )
    language = dict(zip(corpus["text_id"], corpus["language"], strict=True))
    keys, conditions = plan(features, params)
    saes = {name: sae.load(Path("data/sae"), name).to(device) for name in params.hookpoints}
    model = loading.load_model(params.model, params.ablate.dtype).to(device)
    matmul.use_in(model)
    hookpoints.resolve(model, params.hookpoints)

    of = [language[text.text_id] for text in texts]
    # One hookpoint alone is only asked what it does to its own language: that is what costs little.
    alone, own = keys["hookpoint"].is_not_null(), [[name == here for here in of] for name in keys["ablated"]]
    asked = torch.tensor(own) | ~torch.tensor(alone.to_list()).unsqueeze(1)
    knobs = params.model_dump(include={"ablate", "hookpoints", "languages", "model", "seed"})
    inputs = {str(path): dvc_md5(path) for path in (CORPUS, FEATURES, Path("data/sae"))}
    keep = scratch(fingerprint("ablate", knobs | {"max_tokens": params.corpus.max_tokens}, inputs))
    with Progress("ablate", sum(max(len(text.ids) - max(text.special, 1), 0) for text in texts), "tokens") as progress:
        nll = ablation.ablate(
            model, saes, texts, conditions, params.ablate.batch_tokens, asked=asked, keep=keep, advance=progress.update
        )
    cells = selectivity.cells(
        nll.clean.numpy(), nll.ablated.numpy(), nll.tokens.numpy(), of, params.ablate.bootstrap, params.seed
    )
    write(cells, keys, params, passes=nll.passes, pairs=int(asked.sum()))
    shutil.rmtree(keep, ignore_errors=True)


def plan(features: pl.DataFrame, params: config.Config) -> tuple[pl.DataFrame, list[Any]]:
    """The conditions and what each is: `condition`, `hookpoint` (null: all together), `ablated`."""
    from babelscope.evaluation.ablation import Condition

    keys: list[tuple[str | None, str]] = [(None, name) for name in params.languages]
    if params.ablate.by_layer:
        keys += [(hookpoint, name) for hookpoint in params.hookpoints for name in params.languages]
    conditions = []
    for hookpoint, name in keys:
        mine = features.filter(pl.col("language") == name)
        units = {h: mine.filter(pl.col("hookpoint") == h)["unit"].to_list() for h in params.hookpoints}
        label = name if hookpoint is None else f"{name} at {hookpoint}"
        conditions.append(Condition(label, units if hookpoint is None else {hookpoint: units[hookpoint]}))
    frame = pl.DataFrame(keys, schema={"hookpoint": pl.String, "ablated": pl.String}, orient="row")
    return frame.with_row_index("condition").with_columns(pl.col("condition").cast(pl.Int64)), conditions


def write(cells: pl.DataFrame, keys: pl.DataFrame, params: config.Config, passes: int, pairs: int) -> None:
    """Write the matrix of all hookpoints together, the one of each alone, and the numbers that sum them up."""
    from babelscope.evaluation.selectivity import selectivity
    from babelscope.models.hookpoints import layer_of

    order = pl.Enum(params.languages)
    table = (
        cells.join(keys, on="condition", how="left", maintain_order="left")
        .with_columns(method=pl.lit("feature"), kind=pl.lit("sae"), control=pl.lit(None, dtype=pl.Int32))
        .sort("condition", pl.col("evaluated").cast(order))
    )
    columns = ["method", "kind", "ablated", "control", "evaluated", "nll", "tokens", "delta", "low", "high"]
    together = table.filter(pl.col("hookpoint").is_null())
    write_atomically(FOLDER / "nll.parquet", together.select(columns).write_parquet)
    alone = table.filter(pl.col("hookpoint").is_not_null()).with_columns(
        layer=pl.col("hookpoint").map_elements(layer_of, return_dtype=pl.Int32)
    )
    write_atomically(FOLDER / "by_layer.parquet", alone.select("hookpoint", "layer", *columns).write_parquet)

    matrix = together.filter(pl.col("ablated").is_not_null())
    numbers: dict[str, float] = selectivity(matrix, params.languages)
    clean = together.filter(pl.col("ablated").is_null())
    numbers |= {f"nll_clean/{row['evaluated']}": row["nll"] for row in clean.iter_rows(named=True)}
    numbers |= {"tokens": int(clean["tokens"].sum()), "share_computed": passes / pairs}
    own_alone = alone.group_by("hookpoint", maintain_order=True).agg(pl.col("delta").mean())
    numbers |= {f"own_alone/{hookpoint}": delta for hookpoint, delta in own_alone.iter_rows()}
    write_json(Path("metrics/ablate.json"), numbers)
    log.info("ablated   own dNLL   largest other dNLL (nats/token)")
    for name in params.languages:
        others = matrix.filter((pl.col("ablated") == name) & (pl.col("evaluated") != name))
        log.info("%-8s %+9.4f   %+9.4f", name, numbers[f"dnll_own/{name}"], others["delta"].max() or 0.0)
    log.info(
        "own %+.4f, others %+.5f nats/token; diagonal largest in %d of %d rows, %d columns; %.1f %% of pairs computed",
        numbers["own"], numbers["others"], numbers["rows"], len(params.languages), numbers["columns"],
        100 * passes / pairs,
    )  # fmt: skip


if __name__ == "__main__":
    stage.run(main)
