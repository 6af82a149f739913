"""Stage `retrain <hookpoint> <seed>`: the SAE of one hookpoint from another seed, for stage `stability`."""

from pathlib import Path

from babelscope.config import Config
from babelscope.config.schema import Hardware, Train
from babelscope.core import stage
from babelscope.core.paths import Paths
from babelscope.core.resume import kept
from babelscope.sae.training.stored import StoredActivations


def run(params: Config, paths: Paths, hookpoint: str, seed: int) -> None:
    """Write `paths.saes_again / <seed> / hookpoint`."""
    data = StoredActivations(params, paths, hookpoint)
    with kept(f"retrain@{hookpoint}", {"seed": seed, "train": params.train.model_dump()}, data.files) as folder:
        fit(data, params.train, params.hardware, seed, folder, paths.saes_again / str(seed), "retrain")


def fit(
    data: StoredActivations, settings: Train, hardware: Hardware, seed: int, folder: Path, out: Path, name: str
) -> None:
    """Train an SAE and write it to `out / hookpoint`.

    It has no MLflow run, since its curve would add nothing to that of the first training.

    Parameters
    ----------
    folder: for the checkpoint.
    name: shown.
    """
    batches = data.batches(seed)
    from babelscope.sae.training.loop import train

    result = train(batches, settings, hardware, seed=seed, folder=folder, label=name)
    if result is None:
        return
    [(sae, history)] = result
    data.save(sae, history, out / data.hookpoint)
    stage.table(
        ["SAE", "hookpoint", "seed", "FVU (last batch)"],
        [[name, data.hookpoint, seed, f"{history[-1]['fvu']:.3f}"]],
        labels=2,
    )
