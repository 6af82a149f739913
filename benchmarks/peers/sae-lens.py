"""SAELens: its trainer's step on its TopK SAE, with sparse activations, its faster setting.

Activations are then not rescaled by the decoder's norms (its default): that has no gradient for sparse ones on a CPU.
"""

import worker
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor


def prepare(case):
    sparse = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
    config = TopKTrainingSAEConfig(d_in=case.d, d_sae=case.latents, k=case.k, **sparse)
    settings = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=case.batch, lr_end=3e-5)
    trainer = SAETrainer(settings, TopKTrainingSAE(config), iter(()))

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


if __name__ == "__main__":
    worker.serve(prepare, "sae-lens")
