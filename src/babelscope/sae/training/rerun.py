"""Stage `retrain <hookpoint>`: the SAE of one hookpoint from another seed, for `stability` to compare.

It has no MLflow run: its curve says nothing that the first one's does not.
"""

from babelscope.config import Config
from babelscope.core import stage
from babelscope.core.paths import Paths
from babelscope.core.resume import kept
from babelscope.sae.training.stored import StoredActivations


def run(params: Config, paths: Paths, hookpoint: str) -> None:
    """Write `paths.saes_again / hookpoint`."""
    data, seed = StoredActivations(params, paths, hookpoint), params.stability.seed
    knobs = {"seed": seed, "train": params.train.model_dump()}
    with kept(f"retrain@{hookpoint}", knobs, data.files) as folder:
        batches = data.batches(seed)
        from babelscope.sae.training.loop import train

        result = train(batches, params.train, params.hardware, seed=seed, folder=folder, label="retrain")
        if result is None:
            return
        [(sae, history)] = result
        data.save(sae, history, paths.saes_again / hookpoint)
    stage.table(["hookpoint", "seed", "FVU (last batch)"], [[hookpoint, seed, f"{history[-1]['fvu']:.3f}"]])
