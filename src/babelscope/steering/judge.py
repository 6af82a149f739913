"""What is made of a generated text: is it in the language, is it about the prompt, is it fluent?

Two rules, fixed before any result was seen. *Forced*: fastText's most probable language of all 176 is the target.
*Relevant*: of `prompts.CHOICES` prompts, the text's own is the most similar, by the cosine of the unsteered model's
states two thirds up its blocks (mean over the tokens, minus the mean of the language). A text that is about nothing is
relevant in one of eight cases.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor

from babelscope.models import hookpoints as hooks
from babelscope.models.forward import collate, content_activations
from babelscope.models.tokens import TokenizedText, batches, by_length
from babelscope.steering.prompts import CHOICES


def encoder_place(model: Any, place: str) -> str:
    """The residual stream two thirds up the blocks, named as `place` is: `layers.11` of 18 blocks."""
    number = max(0, round(len(hooks.blocks(model)) * 2 / 3) - 1)
    return f"{place.rpartition('.')[0]}.{number}"


@torch.inference_mode()
def embed(model: Any, place: str, texts: Sequence[Sequence[int]], special: Sequence[int], batch_tokens: int) -> Tensor:
    """The mean of the states of each text's tokens at `place`; float32 `[texts, d]`.

    `texts` are token ids, which follow the token ids `special`.
    """
    rows = [TokenizedText(f"{number:08d}", (*special, *ids), len(special)) for number, ids in enumerate(texts)]
    found, device = torch.zeros(0), hooks.device_of(model)
    for batch in batches(by_length(rows), batch_tokens):
        ids, mask, content = (part.to(device) for part in collate(batch))
        states = content_activations(model, [place], (ids, mask, content), torch.float32)[place].cpu()
        if not len(found):
            found = torch.zeros((len(rows), states.shape[1]))
        text = torch.tensor([int(row.text_id) for row in batch])
        lengths = torch.tensor([row.content_tokens for row in batch])
        found.index_add_(0, text.repeat_interleave(lengths), states)
        found[text] /= lengths.unsqueeze(1)
    return found


def relevant(answers: Tensor, asked: Tensor, own: Tensor, pool: Tensor) -> Tensor:
    """Whether an answer's own prompt is the nearest of `CHOICES`: itself and the next ones in its pool, bool `[rows]`.

    Parameters
    ----------
    answers: embeddings of the answers, less the mean of their language, float32 `[rows, d]`.
    asked: the same of the prompts, `[prompts, d]`.
    own: the number of each answer's prompt, int64 `[rows]`.
    pool: for each prompt, the numbers of the prompts that it is compared with, itself first, `[prompts, CHOICES]`.
    """
    unit, prompts = (torch.nn.functional.normalize(x, dim=1) for x in (answers, asked))
    cosine = torch.einsum("rd,rcd->rc", unit, prompts[pool[own]])
    return cosine[:, 0] > cosine[:, 1:].amax(1) if pool.shape[1] > 1 else torch.ones(len(own), dtype=torch.bool)


def pools(sizes: Sequence[int]) -> Tensor:
    """The pool of every prompt, for lists of these sizes that follow each other: itself and the next, in a ring."""
    choices = min(CHOICES, *sizes)
    rows, first = [], 0
    for size in sizes:
        rows += [[first + (number + step) % size for step in range(choices)] for number in range(size)]
        first += size
    return torch.tensor(rows)


def centred(embeddings: Tensor, languages: Sequence[str | None], mean: Mapping[str, Tensor]) -> Tensor:
    """`embeddings` minus the mean state of each text's language; minus the mean of all for an unknown language."""
    overall = torch.stack(list(mean.values())).mean(0)
    return embeddings - torch.stack([mean.get(name or "", overall) for name in languages])


def harmonic(forced: pl.Expr, relevant: pl.Expr) -> pl.Expr:
    """The harmonic mean of two shares; 0 if both are (CLaS-Bench, arXiv 2601.08331)."""
    total = forced + relevant
    return pl.when(total > 0).then(2 * forced * relevant / total).otherwise(0.0)
