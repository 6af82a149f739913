"""EleutherAI's sparsify: a step of the hook and the loop of `Trainer.fit`, without the model.

Variants: "signum" is its default optimizer, schedule-free; all others use Adam with its linear warm-up and decay.
`b_dec` starts at the first batch's mean, as in `fit`. The auxiliary loss, off by default, has Gao et al.'s weight.
"""

import torch
import worker
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

_AUX_K = 1 / 32


def prepare(case: worker.Case, run: worker.Run) -> worker.Training:
    sae = SparseCoder(
        case.d, SparseCoderConfig(num_latents=case.latents, k=case.k), device=worker.DEVICE, dtype=torch.float32
    )
    if run.variant == "signum":
        optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=run.learning_rate), momentum=0.95)
        optimizer.train()
        schedules = []
    else:
        optimizer = torch.optim.Adam(sae.parameters(), lr=run.learning_rate)
        schedules = [get_linear_schedule_with_warmup(optimizer, run.steps // 20, run.steps)]
    did_fire = torch.zeros(case.latents, dtype=torch.bool, device=worker.DEVICE)
    since_fired = torch.zeros(case.latents, dtype=torch.long, device=worker.DEVICE)
    started = False

    def step(x: Tensor) -> None:
        nonlocal started
        if not started:
            sae.b_dec.data = x.mean(0)
            started = True
        sae.set_decoder_norm_to_unit_norm()
        total_variance = (x - x.mean(0)).pow(2).sum()
        out = sae(x=x, y=x, dead_mask=since_fired > run.dead_after, total_variance=total_variance)
        did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        float(out.auxk_loss.detach())
        (out.fvu + _AUX_K * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
        since_fired.add_(len(x))
        since_fired[did_fire] = 0
        did_fire.zero_()

    def weights() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if isinstance(optimizer, ScheduleFreeWrapper):
            optimizer.eval()  # switch to the averaged weights, which it saves
        return sae.encoder.weight, sae.W_dec, sae.encoder.bias, sae.b_dec

    return worker.Training(step, weights)


if __name__ == "__main__":
    worker.serve(prepare, "eai-sparsify")
