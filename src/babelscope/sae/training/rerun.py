"""Stage `retrain <hookpoint> <seed>`: the SAE of one hookpoint from another seed, for stage `stability`.

It has no MLflow run, since its curve would add nothing to that of the first training.
"""

from babelscope.config import Config
from babelscope.core import stage
from babelscope.core.paths import Paths
from babelscope.core.resume import kept
from babelscope.sae.training.stored import StoredActivations


def run(params: Config, paths: Paths, hookpoint: str, seed: int) -> None:
    """Write `paths.saes_again / <seed> / hookpoint`."""
    data = StoredActivations(params, paths, hookpoint)
    used = {"seed": seed, "train": params.train.model_dump()}
    with kept(f"retrain@{hookpoint}", used, data.files) as folder:
        batches = data.batches(seed)
        from babelscope.sae.training.loop import train

        result = train(batches, params.train, params.hardware, seed=seed, folder=folder, label="retrain")
        if result is None:
            return
        [(sae, history)] = result
        data.save(sae, history, paths.saes_again / str(seed) / hookpoint)
    stage.table(["hookpoint", "seed", "FVU (last batch)"], [[hookpoint, seed, f"{history[-1]['fvu']:.3f}"]])
