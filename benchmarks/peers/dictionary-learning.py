"""dictionary_learning: `TopKTrainer.update`; it starts `b_dec` at the first batch's geometric median.

Variant "unit norm": inputs have mean squared norm 1, the normalisation of its `trainSAE`; others use them as given.
"""

import itertools

import worker
from dictionary_learning.trainers.top_k import TopKTrainer
from torch import Tensor


def prepare(case: worker.Case, run: worker.Run) -> worker.Training:
    schedule = {"warmup_steps": run.steps // 20, "decay_start": run.steps - run.steps // 5}
    names = {"layer": 0, "lm_name": "none", "seed": 0, "device": str(worker.DEVICE)}
    trainer = TopKTrainer(run.steps, case.d, case.latents, case.k, lr=run.learning_rate, **schedule, **names)
    trainer.dead_feature_threshold = run.dead_after
    factor = case.d**0.5 if run.variant == "unit norm" else 1.0
    # Step 0 sets the decoder's bias; from step 1001 on, in most steps of a run, the trainer keeps a threshold.
    numbers = itertools.chain([0], itertools.count(1001))

    def step(x: Tensor) -> None:
        trainer.update(next(numbers), x if factor == 1 else x / factor)

    def weights() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sae = trainer.ae
        return sae.encoder.weight, sae.decoder.weight.T, sae.encoder.bias * factor, sae.b_dec * factor

    return worker.Training(step, weights)


if __name__ == "__main__":
    worker.serve(prepare, "dictionary-learning")
