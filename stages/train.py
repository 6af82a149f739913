"""Stage `train <hookpoint>`: one SAE on the activations of one hookpoint; or one that `stream` has trained, or others.

What `train.source` says: `stored` trains it here, `stream` publishes what that stage left, `pretrained` fetches it.
"""

import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import polars as pl

from babelscope import config
from babelscope.activations import streamed
from babelscope.activations.batches import Batches
from babelscope.activations.store import ActivationStore
from babelscope.config.values import local_name
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_json, read_table, write_atomically, write_json
from babelscope.core.fingerprint import dvc_md5, fingerprint
from babelscope.core.resume import scratch
from babelscope.models import hardware
from babelscope.models.hookpoints import layer_of
from babelscope.sae import SAE, checkpoint
from babelscope.sae.metrics import quality

TOKENS = Path("data/activations/tokens.parquet")


def main() -> None:
    params = config.load()
    config.check_folders(params)
    hookpoint = config.hookpoint_argument(sys.argv, params)
    source = {"stored": trained, "stream": published, "pretrained": fetched}[params.train.source]
    figures = source(hookpoint, params)
    if figures is None:
        return
    numbers = figures | {"layer": layer_of(hookpoint)}
    if params.train.source != "pretrained":
        numbers["tokens"] = -(-params.train.tokens // params.train.batch) * params.train.batch
    write_json(Path(f"metrics/train.{hookpoint}.json"), numbers)
    report(hookpoint, numbers, params.languages)


def report(hookpoint: str, numbers: dict[str, float], languages: list[str]) -> None:
    of = sorted((numbers[f"fvu/{name}"], name) for name in languages if f"fvu/{name}" in numbers)
    ends = [f"{fvu:.3f} {name}" for fvu, name in (of[0], of[-1])] if of else ["-", "-"]
    shown = f"{numbers['fvu']:.3f}", *ends, f"{numbers['l0']:.1f}", f"{100 * numbers['dead_share']:.1f} %"
    head = ["hookpoint", "tokens", "FVU (held out)", "lowest", "highest", "L0", "dead latents"]
    stage.table(head, [[hookpoint, f"{numbers['tokens']:,}" if "tokens" in numbers else "-", *shown]])


def published(hookpoint: str, params: config.Config) -> dict[str, float]:
    """Publish the SAE that `stream` has trained; returns its figures. `track` logs its run from the history."""
    out = Path("data/sae") / hookpoint
    streamed.publish(hookpoint, {name: out / name for name in ("cfg.json", "sae_weights.safetensors", "history.csv")})
    return read_json(streamed.OUT / hookpoint / "quality.json")


def fetched(hookpoint: str, params: config.Config) -> dict[str, float]:
    """Write a released SAE as if it had been trained here, but without a history; returns its figures."""
    device, held_out = hardware.prepare(params.hardware), HeldOut(hookpoint, params)
    released, transcode = params.pretrained, params.train.transcode
    folder = released.folder_of(hookpoint, layer_of(hookpoint))
    sae = checkpoint.load(released.name or "", folder, revision=released.revision)
    d_in = (held_out.inputs or held_out.store).d
    if (sae.d_in, sae.d) != (d_in, held_out.store.d):
        raise UserError(
            f"params.yaml: pretrained.folder: the SAE in {folder!r} takes {sae.d_in} dimensions and gives {sae.d}; "
            f"{hookpoint} has {d_in} and {held_out.store.d}"
        )
    if (sae.b_in is not None) != transcode:
        raise UserError(
            f"params.yaml: train.transcode: {transcode}, but {folder!r} holds "
            f"{'an autoencoder' if transcode else 'a transcoder'}; allowed: {not transcode}"
        )
    origin = {"released_as": f"{local_name(released.name or '')}/{folder}", "revision": released.revision}
    out = Path("data/sae") / hookpoint
    checkpoint.save(sae, out, {"model_name": held_out.store.index["model"], "hook_name": hookpoint, **origin})
    (out / "history.csv").unlink(missing_ok=True)
    return held_out.figures(sae.to(device))


class HeldOut:
    """The stored activations of a hookpoint, and the rows to train on and to measure on."""

    def __init__(self, hookpoint: str, params: config.Config) -> None:
        source = Path("data/activations") / hookpoint
        self.languages = params.languages
        self.store, table = ActivationStore(source), read_table(TOKENS)
        self.inputs = ActivationStore(source / "input") if params.train.transcode else None
        if len(table) != self.store.rows:
            raise UserError(f"{TOKENS}: {len(table)} rows, but {source} holds {self.store.rows}: dvc repro extract")
        self.train_rows, self.eval_rows = (table.filter(pl.col("split") == split) for split in ("train", "eval"))
        if self.train_rows.is_empty() or self.eval_rows.is_empty():
            raise UserError(f"{TOKENS}: no rows of split 'train' or none of split 'eval'")

    def figures(self, sae: SAE) -> dict[str, float]:
        """FVU, L0 and dead latents on the held-out rows, in all and per language."""
        code = self.eval_rows["language"].cast(pl.Enum(self.languages)).to_physical().cast(pl.Int64).to_torch()
        rows = self.eval_rows["row"].to_torch()
        return quality(sae, self.store, rows, code, len(self.languages), self.inputs).figures(self.languages)


def trained(hookpoint: str, params: config.Config) -> dict[str, float] | None:
    """Train the SAE and return its figures (null on the other ranks of a distributed run)."""
    device, held_out = hardware.prepare(params.hardware), HeldOut(hookpoint, params)
    source, out = Path("data/activations") / hookpoint, Path("data/sae") / hookpoint
    store, inputs = held_out.store, held_out.inputs
    steps = -(-params.train.tokens // params.train.batch)
    rows, pin = held_out.train_rows["row"].to_torch(), device.type == "cuda"
    batches = Batches(store, rows, params.train.batch, steps, params.seed, inputs, pin=pin)

    from babelscope.sae.training import module
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

    figures = held_out.figures(sae.to(device))
    shutil.rmtree(scratch(work), ignore_errors=True)
    return figures


if __name__ == "__main__":
    stage.run(main)
