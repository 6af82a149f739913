"""Stage `train <hookpoint>`: one SAE on the activations of one hookpoint (or the one that `stream` has trained)."""

import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import polars as pl

from babelscope import config, hardware, stage
from babelscope.activations import streamed
from babelscope.activations.store import ActivationStore
from babelscope.errors import UserError
from babelscope.files import read_json, scratch, write_atomically, write_json
from babelscope.fingerprint import dvc_md5, fingerprint
from babelscope.models.hookpoints import layer_of
from babelscope.sae import checkpoint
from babelscope.sae.batches import Batches
from babelscope.sae.quality import quality

TOKENS = Path("data/activations/tokens.parquet")


def main() -> None:
    params = config.load()
    hookpoint = config.hookpoint_argument(sys.argv, params)
    figures = published(hookpoint) if params.train.source == "stream" else trained(hookpoint, params)
    if figures is None:
        return
    steps = -(-params.train.tokens // params.train.batch)
    numbers = figures | {"tokens": steps * params.train.batch, "layer": layer_of(hookpoint)}
    write_json(Path(f"metrics/train.{hookpoint}.json"), numbers)
    report(hookpoint, numbers, params.languages)


def report(hookpoint: str, numbers: dict[str, float], languages: list[str]) -> None:
    of = sorted((numbers[f"fvu/{name}"], name) for name in languages if f"fvu/{name}" in numbers)
    ends = [f"{fvu:.3f} {name}" for fvu, name in (of[0], of[-1])] if of else ["-", "-"]
    shown = f"{numbers['fvu']:.3f}", *ends, f"{numbers['l0']:.1f}", f"{100 * numbers['dead_share']:.1f} %"
    head = ["hookpoint", "tokens", "FVU (held out)", "lowest", "highest", "L0", "dead latents"]
    stage.table(head, [[hookpoint, f"{numbers['tokens']:,}", *shown]])


def published(hookpoint: str) -> dict[str, float]:
    """Publish the SAE that `stream` has trained; returns its figures. `track` logs its run from the history."""
    out = Path("data/sae") / hookpoint
    streamed.publish(hookpoint, {name: out / name for name in ("cfg.json", "sae_weights.safetensors", "history.csv")})
    return read_json(streamed.OUT / hookpoint / "quality.json")


def trained(hookpoint: str, params: config.Config) -> dict[str, float] | None:
    """Train the SAE and return its figures (null on the other ranks of a distributed run)."""
    device = hardware.prepare(params.hardware)
    source, out = Path("data/activations") / hookpoint, Path("data/sae") / hookpoint
    store, table = ActivationStore(source), pl.read_parquet(TOKENS)
    inputs = ActivationStore(source / "input") if params.train.transcode else None
    if len(table) != store.rows:
        raise UserError(f"{TOKENS}: {len(table)} rows, but {source} holds {store.rows}: dvc repro extract")
    train_rows, eval_rows = (table.filter(pl.col("split") == split) for split in ("train", "eval"))
    if train_rows.is_empty() or eval_rows.is_empty():
        raise UserError(f"{TOKENS}: no rows of split 'train' or none of split 'eval'")
    steps = -(-params.train.tokens // params.train.batch)
    rows, pin = train_rows["row"].to_torch(), device.type == "cuda"
    batches = Batches(store, rows, params.train.batch, steps, params.seed, inputs, pin=pin)

    from babelscope.sae import module
    from babelscope.tracking.training import training_run

    name, knobs = f"train@{hookpoint}", params.model_dump(include={"languages", "seed", "train"})
    work = fingerprint(name, knobs, {str(path): dvc_md5(path) for path in (source, TOKENS)})
    with ExitStack() as stack:
        write: module.Write = lambda step, metrics: None  # noqa: E731
        if module.is_first_process():
            run = training_run(params.track.experiment, stage=name, fingerprint=work, params=knobs)
            write = stack.enter_context(run).log
        result = module.train(
            batches, params.train, params.hardware,
            seed=params.seed, write=[write], checkpoint=scratch(work) / "state.pt",
        )  # fmt: skip
        if result is None:
            return None
        [(sae, history)] = result
        checkpoint.save(sae, out, {"model_name": store.index["model"], "hook_name": hookpoint})
        write_atomically(out / "history.csv", pl.DataFrame(history).write_csv)
        run.finish(dvc_md5(out))

    code = eval_rows["language"].cast(pl.Enum(params.languages)).to_physical().cast(pl.Int64).to_torch()
    held_out = quality(sae.to(device), store, eval_rows["row"].to_torch(), code, len(params.languages), inputs)
    figures = held_out.figures(params.languages)
    shutil.rmtree(scratch(work), ignore_errors=True)
    return figures


if __name__ == "__main__":
    stage.run(main)
