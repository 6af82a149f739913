"""The most probable next tokens, without the logits of the whole vocabulary in float32.

With a vocabulary of 262,144, the logits take twice as long as all blocks of a small model. On a CPU, the vocabulary is
therefore screened by an int8 product (symmetric, one scale per token and per state), which is four times as fast, and
only the best candidates get exact logits.
"""

from typing import Any

import torch
from torch import Tensor

from babelscope.models import hookpoints as hooks
from babelscope.models.nll import entering_unembedding, head_of

# Entries of the vocabulary in one int8 product: 448 x 4,096 int32 scores are 7 MB.
_COLUMNS = 4096
# Entries that share a maximum in the screen, and groups per state whose entries all get exact logits.
_GROUP, _GROUPS = 16, 16


class TopTokens:
    """The `k` largest logits of a model's next token, at the last position of a forward pass.

    Parameters
    ----------
    model: a causal language model. Without a known head (`nll.head_of`), or with another device than a CPU, its logits
        are computed in full.
    screen: whether to screen the vocabulary, which pays for many tokens only.
    """

    def __init__(self, model: Any, screen: bool = True) -> None:
        self.model, self.head = model, head_of(model)
        self.codes: Tensor | None = None
        self.scale: Tensor
        if not screen or self.head is None or hooks.device_of(model).type != "cpu":
            return
        if self.head.unembedding.bias is not None:
            return
        weight = self.head.unembedding.weight
        if len(weight) % _COLUMNS or len(weight) < 2 * _COLUMNS or weight.shape[1] % 8:
            return
        self.scale = weight.abs().amax(1).float().clamp_min(1e-30) / 127
        # In parts, since a float copy of the unembedding may be as large as the model.
        parts = zip(weight.split(_COLUMNS), self.scale.split(_COLUMNS), strict=True)
        self.codes = torch.cat([(rows.float() / size.unsqueeze(1)).round().to(torch.int8) for rows, size in parts])

    def __call__(self, k: int, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Run one pass with `inputs`; float32 logits and int64 token ids, `[rows, k]` each, in descending order."""
        if self.head is None:
            return self._sorted(self.model(**inputs).logits[:, -1].float(), k)
        with entering_unembedding(self.model, stop=True) as entered:
            self.model(**inputs)
        x = entered[0][:, -1]
        if self.codes is None:
            return self._sorted(self.head.logits(x, 0, self.head.unembedding.out_features), k)
        tokens = self._candidates(x)
        found = torch.bmm(self.head.unembedding.weight[tokens].float(), x.float().unsqueeze(2)).squeeze(2)
        logits, order = self._sorted(self.head.finish(found), k)
        return logits, tokens.gather(1, order)

    @staticmethod
    def _sorted(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, index = logits.topk(min(k, logits.shape[1]), dim=1)
        return values, index

    def _candidates(self, x: Tensor) -> Tensor:
        """Token ids that hold the largest logits of states `x` `[rows, d]`; int64 `[rows, _GROUP * _GROUPS]`."""
        assert self.codes is not None
        rows = x.float()
        states = (rows / rows.abs().amax(1, keepdim=True).clamp_min(1e-30) * 127).round().to(torch.int8)
        largest = []
        for first in range(0, len(self.codes), _COLUMNS):
            scores = torch._int_mm(states, self.codes[first : first + _COLUMNS].T).float()
            scores *= self.scale[first : first + _COLUMNS]
            # A group is every (_COLUMNS / _GROUP)-th entry of the chunk, so that maxima are over whole vectors.
            largest.append(scores.view(len(x), _GROUP, -1).amax(1))
        group = torch.cat(largest, 1).topk(_GROUPS, dim=1).indices
        width = _COLUMNS // _GROUP
        start: Tensor = group // width * _COLUMNS + group % width
        return (start.unsqueeze(2) + torch.arange(_GROUP) * width).flatten(1)
