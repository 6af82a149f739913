"""The most probable next tokens, without the logits of the whole vocabulary in float32.

With a vocabulary of 262,144, the logits take twice as long as all blocks of a small model. On a CPU, the vocabulary is
therefore screened by an int8 product, which is four times as fast, and only the best candidates get exact logits.

The codes are symmetric, with one scale per state and per group of tokens. States of some families are a hundred times
as large in a few dimensions as in the others, of which a code would keep nothing. So the states are divided by a size
in each dimension and the unembedding is multiplied by it, after which both vary equally from dimension to dimension
(SmoothQuant, arXiv 2211.10438).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from babelscope.models import hookpoints as hooks
from babelscope.models.nll import entering_unembedding, head_of
from babelscope.models.probing import probe_ids

# Entries of the vocabulary in one int8 product: 448 x 4,096 int32 scores are 7 MB.
_COLUMNS = 4096
# Entries that share a maximum in the screen. The best `k + _MORE` groups get exact logits for all their entries.
_GROUP, _MORE = 16, 6
# States in one product of exact logits, so that the weights of their candidates stay small.
_ROWS = 32


class TopTokens:
    """The `k` largest logits of a model's next token, at the last position of a forward pass.

    With the screen, a token is missed if its group is not among the best `k + _MORE` by the rounded scores. What a row
    gets depends on no other row.

    Parameters
    ----------
    model: a causal language model. Without a known head (`nll.head_of`), or with another device than a CPU, its logits
        are computed in full.
    screen: whether to screen the vocabulary, which pays for many tokens only.
    """

    def __init__(self, model: Any, screen: bool = True) -> None:
        self.model, self.head = model, head_of(model)
        self.codes: Tensor | None = None
        if not screen or self.head is None or hooks.device_of(model).type != "cpu":
            return
        if self.head.unembedding.bias is not None:
            return
        weight = self.head.unembedding.weight
        if len(weight) % _COLUMNS or len(weight) < 2 * _COLUMNS or weight.shape[1] % 8:
            return
        with torch.inference_mode(), entering_unembedding(model, stop=True) as entered:
            model(input_ids=probe_ids(model, 8, 16), use_cache=False)
        # The first token is an attention sink, whose state is unlike the others.
        states = entered[0][:, 1:].float().square().mean((0, 1))
        entries = torch.stack([part.float().square().mean(0) for part in weight.split(_COLUMNS)]).mean(0)
        self.size: Tensor = (states.clamp_min(1e-30) / entries.clamp_min(1e-30)) ** 0.25
        codes: list[Tensor] = []
        scales: list[Tensor] = []
        # In parts, since a float copy of the unembedding may be as large as the model. A group is every
        # (_COLUMNS / _GROUP)-th entry of a part, so that maxima are over whole vectors.
        for part in weight.split(_COLUMNS):
            rows = (part.float() * self.size).view(_GROUP, -1, weight.shape[1])
            scale = rows.abs().amax((0, 2)).clamp_min(1e-30) / 127
            codes.append((rows / scale.unsqueeze(1)).round().to(torch.int8).flatten(0, 1))
            scales.append(scale)
        self.codes = torch.cat(codes)
        self.scale: Tensor = torch.cat(scales)

    def __call__(self, k: Sequence[int], **inputs: Any) -> tuple[Tensor, Tensor]:
        """Run one pass with `inputs`; float32 logits and int64 token ids, in descending order: `[rows, max(k)]` each.

        `k` is that of each row. The logits of a row with a smaller one may end with -inf.
        """
        if self.head is None:
            return self._sorted(self.model(**inputs).logits[:, -1].float(), max(k))
        with entering_unembedding(self.model, stop=True) as entered:
            self.model(**inputs)
        x = entered[0][:, -1]
        if self.codes is None:
            return self._sorted(self.head.logits(x, 0, self.head.unembedding.out_features), max(k))
        logits, tokens = (
            x.new_full((len(x), max(k)), -torch.inf, dtype=torch.float32),
            torch.zeros(len(x), max(k)).long(),
        )
        for count in sorted(set(k)):
            rows = torch.tensor([number for number, own in enumerate(k) if own == count])
            found, which = self._screened(x[rows], count)
            logits[rows, : found.shape[1]], tokens[rows, : found.shape[1]] = found, which
        return logits, tokens

    def _screened(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        assert self.head is not None
        tokens = self._candidates(x, min(k + _MORE, len(self.scale)))
        weight = self.head.unembedding.weight
        parts = zip(torch.split(x.float().unsqueeze(2), _ROWS), torch.split(tokens, _ROWS), strict=True)
        found = torch.cat([torch.bmm(weight[some].float(), states).squeeze(2) for states, some in parts])
        logits, order = self._sorted(self.head.finish(found), k)
        return logits, tokens.gather(1, order)

    @staticmethod
    def _sorted(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, index = logits.topk(min(k, logits.shape[1]), dim=1)
        return values, index

    def _candidates(self, x: Tensor, groups: int) -> Tensor:
        """Token ids that hold the largest logits of states `x` `[rows, d]`; int64 `[rows, _GROUP * groups]`."""
        assert self.codes is not None
        rows = x.float() / self.size
        states = (rows / rows.abs().amax(1, keepdim=True).clamp_min(1e-30) * 127).round().to(torch.int8)
        parts = torch.split(self.codes, _COLUMNS)
        largest = [torch._int_mm(states, codes.T).view(len(x), _GROUP, -1).amax(1) for codes in parts]
        group = (torch.cat(largest, 1) * self.scale).topk(groups, dim=1).indices
        width = _COLUMNS // _GROUP
        start = group // width * _COLUMNS + group % width
        tokens: Tensor = (start.unsqueeze(2) + torch.arange(_GROUP) * width).flatten(1)
        return tokens
