"""dictionary_learning: `TopKTrainer.update`."""

import itertools

import worker
from dictionary_learning.trainers.top_k import TopKTrainer
from torch import Tensor


def prepare(case):
    trainer = TopKTrainer(10**6, case.d, case.latents, case.k, layer=0, lm_name="none", seed=0, device="cpu")
    # Step 0 sets the decoder's bias; from step 1001 on, in most steps of a run, the trainer keeps a threshold.
    numbers = itertools.chain([0], itertools.count(1001))

    def step(x: Tensor) -> None:
        trainer.update(next(numbers), x)

    return step


if __name__ == "__main__":
    worker.serve(prepare, "dictionary-learning")
