"""SAELens: its trainer's step on its TopK SAE.

Variants: "fastest" has sparse activations without its default rescaling by the decoder's norms, which has no gradient
for sparse activations on a CPU; all others have its defaults. It starts `b_dec` at 0; all variants except "fastest"
get a better start, the first batch's mean.
"""

import worker
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor


def prepare(case: worker.Case, run: worker.Run) -> worker.Training:
    fast = run.variant == "fastest"
    sparse = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False} if fast else {}
    config = TopKTrainingSAEConfig(device=str(worker.DEVICE), d_in=case.d, d_sae=case.latents, k=case.k, **sparse)
    settings = SAETrainerConfig(
        device=str(worker.DEVICE),
        total_training_samples=run.steps * case.batch,
        train_batch_size_samples=case.batch,
        lr=run.learning_rate,
        lr_end=run.learning_rate / 10,  # asked for, but not used by the constant schedule
        lr_warm_up_steps=run.steps // 20,
        lr_decay_steps=run.steps // 5,
        dead_feature_window=run.dead_after // case.batch,
    )
    trainer = SAETrainer(settings, TopKTrainingSAE(config), iter(()))

    def step(x: Tensor) -> None:
        if trainer.n_training_steps == 0 and not fast:
            trainer.sae.b_dec.data = x.mean(0)
        trainer.step(x)
        trainer.n_training_steps += 1

    def weights() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sae = trainer.sae
        # Scores are multiplied by the decoder rows' norms, and decoded values divided by them: fold both in.
        norms = sae.W_dec.norm(dim=1) if config.rescale_acts_by_decoder_norm else sae.W_dec.new_ones(case.latents)
        return sae.W_enc.T * norms[:, None], sae.W_dec / norms[:, None], sae.b_enc * norms, sae.b_dec

    return worker.Training(step, weights)


if __name__ == "__main__":
    worker.serve(prepare, "sae-lens")
