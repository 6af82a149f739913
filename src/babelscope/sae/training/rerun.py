"""Stage `retrain <hookpoint> <seed>`: the SAE of one hookpoint from another seed, for stage `stability`."""

from pathlib import Path

from babelscope.config import Config
from babelscope.config.schema import Train
from babelscope.core import stage
from babelscope.core.paths import Paths
from babelscope.core.resume import kept
from babelscope.sae.training.stored import StoredActivations


def run(params: Config, paths: Paths, hookpoint: str, seed: int) -> None:
    """Write `paths.saes_again / <seed> / hookpoint`."""
    fit(params, paths, hookpoint, params.train, seed, paths.saes_again / str(seed), "retrain")


def fit(params: Config, paths: Paths, hookpoint: str, settings: Train, seed: int, out: Path, name: str) -> None:
    """Train an SAE on stored activations and write it to `out / hookpoint`.

    It has no MLflow run, since its curve would add nothing to that of the first training. `name` is shown.
    """
    data = StoredActivations(params, paths, hookpoint)
    with kept(f"{name}@{hookpoint}", {"seed": seed, "train": settings.model_dump()}, data.files) as folder:
        batches = data.batches(seed)
        from babelscope.sae.training.loop import train

        result = train(batches, settings, params.hardware, seed=seed, folder=folder, label=name)
        if result is None:
            return
        [(sae, history)] = result
        data.save(sae, history, out / hookpoint)
    stage.table(
        ["SAE", "hookpoint", "seed", "FVU (last batch)"],
        [[name, hookpoint, seed, f"{history[-1]['fvu']:.3f}"]],
        labels=2,
    )
