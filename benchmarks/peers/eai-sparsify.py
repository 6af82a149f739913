"""EleutherAI's sparsify: what the hook and the loop of `Trainer.fit` do in a step, with Adam, without the model."""

import torch
import worker
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor
from transformers import get_linear_schedule_with_warmup


def prepare(case):
    torch.set_float32_matmul_precision("high")
    sae = SparseCoder(case.d, SparseCoderConfig(num_latents=case.latents, k=case.k), dtype=torch.float32)
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4 / (case.latents / 2**14) ** 0.5)
    schedule = get_linear_schedule_with_warmup(optimizer, 1000, 10**6)
    did_fire = torch.zeros(case.latents, dtype=torch.bool)
    since_fired = torch.zeros(case.latents, dtype=torch.long)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        total_variance = (x - x.mean(0)).pow(2).sum()
        out = sae(x=x, y=x, total_variance=total_variance)
        did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        since_fired.add_(len(x))
        since_fired[did_fire] = 0
        did_fire.zero_()

    return step


if __name__ == "__main__":
    worker.serve(prepare, "eai-sparsify")
