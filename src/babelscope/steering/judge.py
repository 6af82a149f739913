"""What is made of a generated text: is it in the language, and is it about the prompt?

Two rules, fixed before any result was seen. *Forced*: fastText's most probable language of all 176 is the target.
*Relevant*: of `prompts.CHOICES` prompts, the text's own is the most similar, by the cosine of the unsteered model's
states two thirds up its blocks (mean over the tokens, minus the mean of the language). A text that is about nothing is
relevant in one of eight cases.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from babelscope.config import Config
from babelscope.core.endpoint import Client, Message, Request, check_cost, verdicts
from babelscope.core.progress import Progress
from babelscope.models import hookpoints as hooks
from babelscope.models.forward import collate, content_activations
from babelscope.models.names import INPUT
from babelscope.models.tokens import TokenizedText, batches, by_length
from babelscope.steering.prompts import CHOICES

log = logging.getLogger(__name__)

# Answers in one request to an endpoint.
TOGETHER = 5
_ABOUT = (
    "You are shown numbered prompts, each with an answer, which may be in another language, cut off or ungrammatical. "
    "Say of each answer whether it is about what its prompt is about. Answer with a JSON list of 0 (no) and 1 (yes) "
    "alone, one number per answer."
)


def encoder_place(model: Any, place: str) -> str:
    """The residual stream two thirds up the blocks, named as `place` is: `layers.11` of 18 blocks."""
    number = max(0, round(len(hooks.blocks(model)) * 2 / 3) - 1)
    return f"{place.removesuffix(INPUT).rpartition('.')[0]}.{number}"


@torch.inference_mode()
def embed(model: Any, place: str, texts: Sequence[Sequence[int]], special: Sequence[int], batch_tokens: int) -> Tensor:
    """The mean of the states of each text's tokens at `place`; float32 `[texts, d]`.

    `texts` are token ids, which follow the token ids `special`.
    """
    rows = [TokenizedText(f"{number:08d}", (*special, *ids), len(special)) for number, ids in enumerate(texts)]
    found, device = torch.zeros(0), hooks.device_of(model)
    for batch in batches(by_length(rows), batch_tokens):
        ids, attention, content = (part.to(device) for part in collate(batch))
        states = content_activations(model, [place], (ids, attention, content), torch.float32)[place].cpu()
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


def _messages(pairs: Sequence[str]) -> list[Message]:
    numbered = "\n".join(f"{number}. {pair}" for number, pair in enumerate(pairs, 1))
    return [{"role": "system", "content": _ABOUT}, {"role": "user", "content": numbered}]


class Endpoint:
    """Asks a model behind `explain.endpoint` whether answers are about their prompts; `folder` keeps its replies."""

    def __init__(self, params: Config, folder: Path) -> None:
        self.section, self.asked = params.explain, list[Request]()
        self.client = Client(str(self.section.endpoint), str(self.section.model), folder, params.hardware.parallel)

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Whether each answer is about its prompt; those on which a reply says nothing are not.

        Raises
        ------
        UserError: all requests so far could cost more than `explain.max_cost`; or see `Client.ask`.
        """
        pairs = [f"Prompt: {prompt}\nAnswer: {answer}" for prompt, answer in zip(prompts, answers, strict=True)]
        groups = [pairs[first : first + TOGETHER] for first in range(0, len(pairs), TOGETHER)]
        requests = [Request(_messages(group), 8 * TOGETHER) for group in groups]
        self.asked += requests
        check_cost(self.asked, self.section, "steer", "steer.prompts")
        with Progress("judge", len(requests), "requests") as progress:
            replies = self.client.ask(requests, progress.update)
        found = [verdicts(reply, len(group)) for reply, group in zip(replies, groups, strict=True)]
        if unread := found.count(None):
            log.warning("steer: %d of %d replies of the judge are no list of verdicts", unread, len(found))
        return [value for one, group in zip(found, groups, strict=True) for value in one or [False] * len(group)]


def harmonic(forced: pl.Expr, relevant: pl.Expr) -> pl.Expr:
    """The harmonic mean of two shares; 0 if both are (CLaS-Bench, arXiv 2601.08331)."""
    total = forced + relevant
    return pl.when(total > 0).then(2 * forced * relevant / total).otherwise(0.0)
