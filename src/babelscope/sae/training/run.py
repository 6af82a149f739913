"""Stage `train <hookpoint>`: the SAE of one hookpoint, trained here, trained by stage `stream`, or released."""

import shutil
from contextlib import ExitStack, nullcontext
from pathlib import Path

from babelscope.config import Config, check_folders
from babelscope.config.values import local_name
from babelscope.core import resume, stage
from babelscope.core.errors import UserError
from babelscope.core.files import copy_file, read_json, write_json
from babelscope.core.fingerprint import dvc_md5, fingerprint
from babelscope.core.paths import Paths
from babelscope.core.resume import scratch
from babelscope.models.hardware import device_count
from babelscope.models.names import layer_of
from babelscope.sae import checkpoint
from babelscope.sae.training import ahead
from babelscope.sae.training.stored import StoredActivations


def run(params: Config, paths: Paths, hookpoint: str) -> None:
    """Write `paths.saes / hookpoint` and the stage's metrics, as `train.source` says."""
    check_folders(params)
    source = {"stored": trained, "stream": published, "pretrained": fetched}[params.train.source]
    figures = source(params, paths, hookpoint)
    if figures is None:
        return
    numbers = figures | {"layer": layer_of(hookpoint)}
    if params.train.source != "pretrained":
        numbers["tokens"] = -(-params.train.tokens // params.train.batch) * params.train.batch
    write_json(paths.metrics("train", hookpoint), numbers)
    report(hookpoint, numbers)


def report(hookpoint: str, numbers: dict[str, float]) -> None:
    """Log a table of the figures."""
    by_language = sorted((fvu, key.removeprefix("fvu/")) for key, fvu in numbers.items() if key.startswith("fvu/"))
    ends = [f"{fvu:.3f} {name}" for fvu, name in (by_language[0], by_language[-1])] if by_language else ["-", "-"]
    shown = f"{numbers['fvu']:.3f}", *ends, f"{numbers['l0']:.1f}", f"{100 * numbers['dead_share']:.1f} %"
    head = ["hookpoint", "tokens", "FVU (held out)", "lowest", "highest", "L0", "dead latents"]
    stage.table(head, [[hookpoint, f"{numbers['tokens']:,}" if "tokens" in numbers else "-", *shown]])


def published(params: Config, paths: Paths, hookpoint: str) -> dict[str, float]:
    """Copy the SAE that stage `stream` trained and return its figures; stage `track` logs its run from the history."""
    for name in ("cfg.json", "sae_weights.safetensors", "history.csv"):
        copy_file(paths.stream / hookpoint / name, paths.saes / hookpoint / name)
    return read_json(paths.stream / hookpoint / "quality.json")


def fetched(params: Config, paths: Paths, hookpoint: str) -> dict[str, float]:
    """Write a released SAE like a trained one, but without a history, and return its figures."""
    data, out = StoredActivations(params, paths, hookpoint), paths.saes / hookpoint
    released, transcode = params.pretrained, params.train.transcode
    name, folder = released.place_of(hookpoint, layer_of(hookpoint))
    sae = checkpoint.load(name, folder, revision=released.revision)
    d_in = (data.inputs or data.store).d
    if (sae.d_in, sae.d) != (d_in, data.store.d):
        raise UserError(
            f"params.yaml: pretrained.folder: the SAE in {folder!r} takes {sae.d_in} dimensions and gives {sae.d}; "
            f"{hookpoint} has {d_in} and {data.store.d}"
        )
    if sae.is_transcoder != transcode:
        raise UserError(
            f"params.yaml: train.transcode: {transcode}, but {folder!r} holds "
            f"{'an autoencoder' if transcode else 'a transcoder'}; allowed: {not transcode}"
        )
    origin = {"released_as": f"{local_name(name)}/{folder}", "revision": released.revision}
    checkpoint.save(sae, out, {"model_name": data.store.index["model"], "hook_name": hookpoint, **origin})
    (out / "history.csv").unlink(missing_ok=True)
    return data.figures(sae)


def trained(params: Config, paths: Paths, hookpoint: str) -> dict[str, float] | None:
    """Train the SAE with a live MLflow run, and return its figures (None on ranks other than the first).

    If another training has trained it meanwhile (see `ahead`), its files are copied.
    """
    data, out = StoredActivations(params, paths, hookpoint), paths.saes / hookpoint
    name, used = f"train@{hookpoint}", params.model_dump(include={"seed", "train"})
    work = fingerprint(name, used, {str(path): dvc_md5(path) for path in data.files})
    folder = scratch(work)
    if (folder / ahead.FIGURES).is_file():
        if stage.is_ahead():  # another process has trained it ahead
            resume.work.keep = folder
            return None
        return _taken(folder, out)
    # Not for the other activation functions, whose gradients the number of threads rounds differently.
    pairs = (
        data.device.type == "cpu"
        and device_count(params.hardware) * params.hardware.num_nodes == 1
        and params.train.activation in ("topk", "batchtopk")
    )
    weights = params.train.latents * data.store.d
    with ahead.beside("train", hookpoint, params, weights) if pairs else nullcontext(False) as paired:
        batches = data.batches(params.seed)

        from babelscope.sae.training.loop import Write, train
        from babelscope.tracking.training import TrainingRun

        with ExitStack() as stack:
            write: Write | None = None
            if resume.is_first_rank():
                resumes = (folder / "last.ckpt").exists()
                run = TrainingRun(params, stage=name, fingerprint=work, used=used, resumes=resumes)
                write = stack.enter_context(run).log
            with ahead.shared_threads(weights, paired) if pairs else nullcontext(params.hardware.threads) as threads:
                machine = params.hardware.model_copy(update={"threads": threads})
                result = train(batches, params.train, machine, seed=params.seed, folder=folder, write=write)
            if result is None:
                return None
            [(sae, history)] = result
            target = folder / "sae" if stage.is_ahead() else out
            data.save(sae, history, target)
            run.finish(dvc_md5(target), history)
        figures = data.figures(sae)
    if stage.is_ahead():
        resume.work.keep = folder
        write_json(folder / ahead.FIGURES, figures)
        return None
    shutil.rmtree(folder, ignore_errors=True)
    return figures


def _taken(folder: Path, out: Path) -> dict[str, float]:
    """Copy a finished SAE from the scratch folder, and return its figures."""
    figures = read_json(folder / ahead.FIGURES)
    for file in sorted((folder / "sae").iterdir()):
        copy_file(file, out / file.name)
    shutil.rmtree(folder, ignore_errors=True)
    return figures
