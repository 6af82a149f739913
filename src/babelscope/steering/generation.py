"""Steering: generate text while one language's features are amplified, from the same prompts for all languages.

`x <- x + strength * sum_u m_u W_dec[u]` at every hookpoint, with `m_u` the mean activation of u over all tokens of the
language: strength 1 adds what the language's features add, on average, to a token of its own text. (Andrylie et al.
2025, arXiv 2507.11230, measure perplexity with multiples of the largest activations of all units at once. With hundreds
of units per language, such activations are far from any that the model produces.)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from babelscope.models import hookpoints as hooks
from babelscope.models.nll import text_nll
from babelscope.sae.autoencoder import SAE


def direction(sae: SAE, units: Sequence[int], means: Sequence[float]) -> Tensor:
    """`sum_u m_u W_dec[u]`, float32 `[d]`: what `units`, each as active as in `means`, add at their hookpoint."""
    index = torch.tensor(list(units), dtype=torch.int64, device=sae.W_dec.device)
    weight = torch.tensor(list(means), dtype=torch.float32, device=sae.W_dec.device)
    return weight @ sae.W_dec.detach()[index]


def add(vectors: Tensor, special: int = 1) -> hooks.Edit:
    """The edit that adds `vectors[row]` (`[rows, d]`) to every position of a text but the first `special`.

    The first pass covers the whole prompt; with a key-value cache every later pass covers one position.
    """

    def edit(x: Tensor) -> Tensor:
        first = special if x.shape[1] > 1 else 0
        return torch.cat([x[:, :first], (x[:, first:].float() + vectors.unsqueeze(1)).to(x.dtype)], dim=1)

    return edit


def generate(
    model: Any,
    prompts: Tensor,
    vectors: Mapping[str, Tensor],
    *,
    new_tokens: int,
    temperature: float,
    seed: int,
    special: int = 0,
    first_row: int = 0,
) -> Tensor:
    """Generate from every prompt while the vectors of its row are added at the hookpoints.

    The model's own `generation_config` (repetition_penalty, top_k, ...) has no effect: tokens are drawn from the
    probabilities of the model, at `temperature`. End-of-text tokens are never generated.

    Parameters
    ----------
    model: a causal language model.
    prompts: token ids, int64 `[rows, prompt tokens]`, at least two; all of one length, so that nothing is padded.
    vectors: by hookpoint, float32 `[rows, d]`.
    new_tokens: number of tokens to generate.
    temperature: of the sampling; 0 takes the most probable token.
    seed: of the sampling.
    special: number of leading special tokens (BOS) in each prompt. They are not changed, and the first token never is:
        it is an attention sink.
    first_row: number of the first row among all rows. A row's draws depend on `seed` and its number, not on the batch.

    Returns
    -------
    The generated tokens, int64 `[rows, new_tokens]`.
    """
    from transformers import GenerationConfig

    device = hooks.device_of(model)
    ids = prompts.to(device)
    edits = {name: add(rows.to(device), max(special, 1)) for name, rows in vectors.items()}
    numbers = range(first_row, first_row + len(ids))
    uniform = np.stack([np.random.default_rng([seed, row]).random(new_tokens, np.float32) for row in numbers])
    own_config = model.generation_config
    ends = torch.tensor(own_config.eos_token_id or [], dtype=torch.int64).flatten()

    def choose(seen: Tensor, logits: Tensor) -> Tensor:
        logits[:, ends] = -torch.inf
        drawn = torch.from_numpy(uniform[:, seen.shape[1] - ids.shape[1]])
        token = _pick(logits, drawn, temperature).to(device)
        return logits.scatter_(1, token.unsqueeze(1), torch.inf)  # `generate` takes the largest

    # `generate` takes unset values from the model's own config, so that is replaced.
    model.generation_config = GenerationConfig()
    try:
        with torch.inference_mode(), hooks.editing(model, edits):
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, pad_token_id=0, use_cache=True,
                do_sample=False, logits_processor=[choose],
            )  # fmt: skip
    finally:
        model.generation_config = own_config
    generated: Tensor = out[:, ids.shape[1] :].cpu()
    return generated


def _pick(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Draw a token per row from `softmax(logits / temperature)` by inverting the cumulative distribution.

    Parameters
    ----------
    logits: `[rows, vocabulary]`.
    uniform: float32 `[rows]`, in [0, 1).
    temperature: 0 takes the most probable token.
    """
    if temperature == 0:
        return logits.argmax(1)
    # On the CPU: a GPU does not always add in the same order.
    cumulative = (logits.float() / temperature).softmax(1).cpu().cumsum_(1)
    wanted = uniform.unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1).clamp_max(logits.shape[1] - 1)


def fluency(model: Any, prompts: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    """How likely the generated tokens are without steering, and how repetitive they are.

    Returns
    -------
    nll: nats per generated token, given the prompt, under the unsteered model; float64 `[rows]`.
    distinct: distinct-2 (Li et al. 2016, arXiv 1510.03055), distinct pairs of neighbouring tokens over all such pairs;
        float64 `[rows]`.
    """
    device = hooks.device_of(model)
    ids = torch.cat([prompts, generated], dim=1).to(device)
    special = torch.full((len(ids),), prompts.shape[1], device=device)
    with torch.inference_mode():
        nll = text_nll(model, ids, torch.ones_like(ids), special) / generated.shape[1]
    pairs = [len(set(zip(row, row[1:], strict=False))) for row in generated.tolist()]
    return nll.cpu(), torch.tensor(pairs, dtype=torch.float64) / (generated.shape[1] - 1)
