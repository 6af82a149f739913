"""Stage `train <hookpoint>`: one TopK SAE on the activations of one hookpoint."""

import logging
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import polars as pl

from babelscope import config, hardware, stage
from babelscope.activations.store import ActivationStore
from babelscope.errors import UserError
from babelscope.files import scratch, write_atomically, write_json
from babelscope.fingerprint import dvc_md5, fingerprint
from babelscope.models.hookpoints import layer_of
from babelscope.sae import checkpoint
from babelscope.sae.batches import Batches
from babelscope.sae.quality import quality

TOKENS = Path("data/activations/tokens.parquet")
log = logging.getLogger(__name__)


def main() -> None:
    params = config.load()
    hookpoint = config.hookpoint_argument(sys.argv, params)
    device = hardware.prepare(params.hardware)
    source, out = Path("data/activations") / hookpoint, Path("data/sae") / hookpoint
    store, table = ActivationStore(source), pl.read_parquet(TOKENS)
    if len(table) != store.rows:
        raise UserError(f"{TOKENS}: {len(table)} rows, but {source} holds {store.rows}: dvc repro extract")
    train_rows, eval_rows = (table.filter(pl.col("split") == split) for split in ("train", "eval"))
    if train_rows.is_empty() or eval_rows.is_empty():
        raise UserError(f"{TOKENS}: no rows of split 'train' or none of split 'eval'")
    steps = -(-params.train.tokens // params.train.batch)
    batches = Batches(store, train_rows["row"].to_torch(), params.train.batch, steps, params.seed)

    from babelscope.sae import module
    from babelscope.tracking.training import training_run

    name, knobs = f"train@{hookpoint}", params.model_dump(include={"languages", "seed", "train"})
    work = fingerprint(name, knobs, {str(path): dvc_md5(path) for path in (source, TOKENS)})
    with ExitStack() as stack:
        write: module.Write = lambda step, metrics: None  # noqa: E731
        if module.is_first_process():
            run = training_run(params.track.experiment, stage=name, fingerprint=work, params=knobs)
            write = stack.enter_context(run).log
        trained = module.train(
            batches, params.train, params.hardware,
            seed=params.seed, write=write, checkpoint=scratch(work) / "state.pt",
        )  # fmt: skip
        if trained is None:
            return
        sae, history = trained
        checkpoint.save(sae, out, {"model_name": store.index["model"], "hook_name": hookpoint})
        write_atomically(out / "history.csv", pl.DataFrame(history).write_csv)
        run.finish(dvc_md5(out))

    sae = sae.to(device)
    code = eval_rows["language"].cast(pl.Enum(params.languages)).to_physical().cast(pl.Int64).to_torch()
    held_out = quality(sae, store, eval_rows["row"].to_torch(), code, len(params.languages))
    if held_out.fvu != held_out.fvu:
        raise UserError(
            f"params.yaml: train.learning_rate: training diverged at {params.train.learning_rate}; lower it"
        )
    figures = {"fvu": held_out.fvu, "l0": held_out.l0, "dead_share": held_out.dead_share}
    by_language = {f"fvu/{language}": fvu for language, fvu in zip(params.languages, held_out.fvu_of, strict=True)}
    measured = {key: fvu for key, fvu in by_language.items() if fvu == fvu}
    numbers = figures | measured | {"tokens": steps * params.train.batch, "layer": layer_of(hookpoint)}
    write_json(Path(f"metrics/train.{hookpoint}.json"), numbers)
    shutil.rmtree(scratch(work), ignore_errors=True)
    log.info("train %s: FVU %.3f, L0 %.1f, %.1f %% dead", hookpoint, *held_out[:2], 100 * held_out.dead_share)


if __name__ == "__main__":
    stage.run(main)
