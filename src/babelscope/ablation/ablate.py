"""Remove units from the forward pass and measure the NLL of every text, under many conditions at once.

Only what can change is computed. One clean pass over a batch of texts shows which tokens each condition changes. If it
changes none, the text has its clean NLL. Otherwise blocks are run from the first hookpoint at which a token changes,
over the tokens from the first changed one on (`babelscope.models.partial`); all else is taken from the clean pass. The
last token of a text predicts nothing and is left out. If the model's attention does not allow this, it runs whole texts
from the first hookpoint at which a token changes or, if it cannot restart there, from the first block.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from babelscope.ablation.interventions import Intervention
from babelscope.core.files import write_atomically
from babelscope.core.resume import read_part
from babelscope.models import hookpoints as hooks
from babelscope.models import partial, probing
from babelscope.models.nll import (
    ROWS,
    divergence,
    head_of,
    output_nll,
    outputs,
    stream_nll,
    stream_outputs,
    targets,
)
from babelscope.models.tokens import MOST_PADDING, TokenizedText, batches, pad


@dataclass
class TextNLL:
    """NLL of every text in the clean run and under every condition.

    Attributes
    ----------
    clean: nats, float64 `[texts]`.
    ablated: nats, float64 `[conditions, texts]`; equal to `clean` where nothing changes, NaN where the condition was
        not asked for.
    tokens: target tokens, int64 `[texts]`.
    passes: number of (condition, text) pairs that were computed.
    computed, whole: number of (condition, text, token, block) tuples that were computed, and that passes over whole
        texts would compute. Clean passes and padding do not count.
    kl: divergence of the next token's distribution under a condition from the clean one, sum over a sample of the
        target tokens, nats, float64 `[conditions, texts]`; NaN where it was not asked for.
    sampled: tokens in the sample, int64 `[texts]`.
    """

    clean: Tensor
    ablated: Tensor
    tokens: Tensor
    passes: int
    computed: int
    whole: int
    kl: Tensor
    sampled: Tensor

    @property
    def share(self) -> float:
        """The share of whole passes that was computed."""
        return self.computed / max(self.whole, 1)

    def add(self, part: "TextNLL", rows: Tensor, columns: Tensor) -> None:
        """Copy `part`, which was measured under the conditions `rows` on the texts `columns` (int64)."""
        self.clean[columns], self.tokens[columns], self.sampled[columns] = part.clean, part.tokens, part.sampled
        pairs = rows.unsqueeze(1), columns
        for mine, new in ((self.ablated, part.ablated), (self.kl, part.kl)):
            mine[pairs] = new.where(~new.isnan(), mine[pairs])
        for key in ("passes", "computed", "whole"):
            setattr(self, key, getattr(self, key) + getattr(part, key))


def ablate(
    model: Any,
    interventions: Mapping[str, Intervention],
    texts: Sequence[TokenizedText],
    batch_tokens: int,
    *,
    asked: Tensor | None = None,
    diverging: Tensor | None = None,
    kl_every: int = 0,
    keep: Path | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> TextNLL:
    """NLL of every text, clean and under every condition.

    Parameters
    ----------
    model: a causal language model.
    interventions: by hookpoint, at least one, all with the same conditions.
    texts: in `by_length` order.
    batch_tokens: tokens in one forward pass.
    asked: bool `[conditions, texts]`, the pairs that are wanted; None: all.
    diverging: bool `[conditions]`, the conditions whose divergence is computed; None: all.
    kl_every: the divergence is computed at every such target token, from one on that depends on the text; 0: at none.
    keep: folder for the result of every batch, from which an interrupted run resumes; the caller deletes it.
    advance: called with the number of target tokens after every batch.
    """
    conditions = len(next(iter(interventions.values())).active)
    wanted = torch.ones((conditions, len(texts)), dtype=torch.bool) if asked is None else asked
    runner = _runner(model, interventions, max((len(text.ids) for text in texts), default=0))
    head_of(model)  # probed now, without hooks, and cached
    parts: list[dict[str, Tensor]] = []
    first = 0
    # Only passes over whole texts compute padding.
    for batch in batches(texts, batch_tokens, math.inf if runner.func is _Partial else MOST_PADDING):
        file = None if keep is None else keep / f"from-{first:06d}.safetensors"
        part = None if file is None else read_part(file)
        if part is None:
            with torch.inference_mode():
                run = runner(model, interventions, batch, batch_tokens, diverging, kl_every)
                part = _batch(run, wanted[:, first : first + len(batch)])
            if file is not None:
                write_atomically(file, functools.partial(save_file, part))
        parts.append(part)
        first += len(batch)
        advance(int(part["tokens"].sum()))
    clean, ablated, tokens, kl, sampled = (
        torch.cat([part[key] for part in parts], -1) for key in ("clean", "ablated", "tokens", "kl", "sampled")
    )
    passes, computed, whole = (sum(int(part[key]) for part in parts) for key in ("passes", "computed", "whole"))
    return TextNLL(clean, ablated.where(wanted, torch.nan), tokens, passes, computed, whole, kl, sampled)


def _runner(
    model: Any, interventions: Mapping[str, Intervention], longest: int
) -> "functools.partial[_Partial] | functools.partial[_Whole]":
    """How the model can run under interventions, found by probing it; `longest`: tokens of the longest text."""
    layers = sorted({hooks.layer_of(name) for name in interventions})
    if not partial.suits(model, longest):
        return functools.partial(_Whole, can_restart=probing.can_restart(model, layers))
    stays = {name: probing.stays_in_place(model, name) for name in interventions}
    in_place = {layer: all(stays[name] for name in stays if hooks.layer_of(name) == layer) for layer in layers}
    return functools.partial(_Partial, in_place=in_place)


def _batch(run: "_Partial | _Whole", wanted: Tensor) -> dict[str, Tensor]:
    """The result of one batch of texts, on the CPU, as `TextNLL` has it."""
    wanted = wanted.to(run.ids.device)
    ablated = run.clean.expand(len(wanted), -1).clone()
    condition, text = (wanted & run.affected()).nonzero(as_tuple=True)
    kl = torch.zeros_like(ablated).where(wanted & run.diverging.unsqueeze(1), torch.nan)
    for pairs in run.split(condition, text):
        ablated[condition[pairs], text[pairs]] = run.ablated(condition[pairs], text[pairs])
        if sum(len(rows) for *_, rows in run.kept) >= ROWS:
            run.add_divergence(kl)
    run.add_divergence(kl)
    blocks = len(hooks.blocks(run.model))
    part = {
        "clean": run.clean,
        "ablated": ablated,
        "tokens": run.target.sum(1),
        "kl": kl,
        "sampled": run.sampled.sum(1),
        "passes": torch.tensor(len(text)),
        "computed": torch.tensor(run.computed),
        "whole": (wanted * run.mask.sum(1)).sum() * blocks,
    }
    return {key: value.cpu().contiguous() for key, value in part.items()}


class _Run:
    """A batch of texts, and which of its tokens the conditions change in the clean run.

    Attributes
    ----------
    layers: the blocks that hold hookpoints, ascending.
    hits: by block of `layers`, bool `[conditions, texts, longest]`, the tokens that a condition changes there.
    target: bool `[texts, longest]`, the tokens from which a target is predicted.
    sampled: those of them whose divergence is computed under the conditions `diverging` (bool `[conditions]`).
    outputs: the clean run's `nll.outputs` at the tokens in `sampled`.
    kept: those of other passes, with the condition, text and position of each: the divergence is cheaper for many.
    """

    outputs: Tensor

    def __init__(
        self, model: Any, interventions: Mapping[str, Intervention], batch: Sequence[TokenizedText], batch_tokens: int,
        diverging: Tensor | None = None, kl_every: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.interventions, self.batch_tokens = model, interventions, batch_tokens
        device = hooks.device_of(model)
        self.ids, self.mask = (t.to(device) for t in pad(batch))
        self.special = torch.tensor([text.special for text in batch], device=device)
        self.position = torch.arange(self.ids.shape[1], device=device)
        self.content_mask = self.mask.bool() & (self.position >= self.special.unsqueeze(1))
        self.layers = sorted({hooks.layer_of(name) for name in interventions})
        conditions = len(next(iter(interventions.values())).active)
        self.hits = {
            layer: torch.zeros((conditions, *self.ids.shape), dtype=torch.bool, device=device) for layer in self.layers
        }
        self.target = torch.zeros_like(self.content_mask)
        self.target[:, :-1] = targets(self.mask, self.special)
        start = torch.tensor([zlib.crc32(text.text_id.encode()) for text in batch], device=device).unsqueeze(1)
        self.sampled = self.target & ((start + self.position) % max(kl_every, 1) == 0) & (kl_every > 0)
        self.diverging = (torch.ones(conditions, dtype=torch.bool) if diverging is None else diverging).to(device)
        self.diverging &= kl_every > 0
        self.kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.computed = 0

    def keep(self, condition: Tensor, text: Tensor, here: Tensor, outputs_of: Callable[[Tensor], Tensor]) -> None:
        """Keep the outputs at the sampled ones of the tokens `here` (bool `[pairs, longest]`) of a pass.

        `outputs_of` gives the outputs at the tokens of a mask like `here`.
        """
        wanted = here & self.sampled[text] & self.diverging[condition].unsqueeze(1)
        pair, position = wanted.nonzero(as_tuple=True)
        if len(pair):
            self.kept.append((condition[pair], text[pair], position, outputs_of(wanted)))

    def add_divergence(self, kl: Tensor) -> None:
        """Add the divergences at the kept tokens to `kl`, float64 `[conditions, texts]`."""
        if self.kept:
            condition, text, position, changed = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
            row = (self.sampled.flatten().cumsum(0) - 1)[text * self.ids.shape[1] + position]
            found = divergence(self.model, self.outputs, changed, row)
            kl.index_put_((condition, text), found, accumulate=True)
            self.kept.clear()

    def affected(self) -> Tensor:
        """Bool `[conditions, texts]`: the pairs in which some token changes."""
        return torch.stack([hit.any(-1) for hit in self.hits.values()]).any(0)

    def record_hits(self, index: Tensor) -> dict[str, hooks.Edit]:
        """Edits for a clean pass that change nothing and fill `hits`.

        `index`: int64 `[tokens]`, the tokens of the batch (text * longest + position) in the order of the pass.
        """
        content = self.content_mask.flatten()[index].nonzero().squeeze(1)

        def edit(x: Tensor, name: str) -> Tensor:
            hit = self.hits[hooks.layer_of(name)].flatten(1)
            hit[:, index[content]] |= self.interventions[name].affected_tokens(x.flatten(0, 1)[content])
            return x

        return {name: functools.partial(edit, name=name) for name in self.interventions}

    def edits(self, layers: range, condition: Tensor, is_content: Tensor) -> dict[str, hooks.Edit]:
        """The edits in `layers` for a pass over tokens under the conditions `condition` (int64 `[tokens]`)."""

        def edit(x: Tensor, name: str) -> Tensor:
            intervention = self.interventions[name]
            changed = (is_content & intervention.active[condition]).nonzero().squeeze(1)
            if not len(changed):
                return x
            flat = x.flatten(0, 1).clone()
            flat[changed] = intervention.change(flat[changed], condition[changed])
            return flat.view_as(x)

        names = [name for name in self.interventions if hooks.layer_of(name) in layers]
        return {name: functools.partial(edit, name=name) for name in names}

    def first_hits(self, condition: Tensor, text: Tensor) -> Tensor:
        """Position of the first token that changes, int64 `[layers, pairs]`; `longest` if none does."""
        return torch.stack([_first(hit[condition, text]) for hit in self.hits.values()])


def _first(hit: Tensor) -> Tensor:
    """Index of the first true value of each row of `hit` `[rows, n]`; n if there is none."""
    return torch.where(hit.any(1), hit.int().argmax(1), hit.shape[1])


class _Partial(_Run):
    """Passes over the tokens that can differ from the clean pass.

    Parameters
    ----------
    in_place: by block that holds hookpoints, whether other tokens see a change at them only in the blocks above.
    """

    def __init__(self, model: Any, *batch: Any, in_place: Mapping[int, bool]) -> None:
        super().__init__(model, *batch)
        self.blocks, self.in_place = len(hooks.blocks(model)), in_place
        self.predicts = torch.zeros_like(self.content_mask)
        self.predicts[:, :-1] = self.mask[:, 1:].bool()
        self.token = torch.zeros(self.ids.shape, device=self.ids.device)
        if self.predicts.any():
            kept = sorted({layer + more for layer in self.layers for more in (0, 1)})
            recording = self.record_hits(self.predicts.flatten().nonzero().squeeze(1))
            self.memory, last = partial.clean_pass(model, self.ids, self.predicts, kept, recording)
            wanted = self.ids.roll(-1, 1)[self.target]
            self.token[self.target] = stream_nll(model, last[self.target[self.predicts]], wanted)
            if self.sampled.any():
                self.outputs = stream_outputs(model, last[self.sampled[self.predicts]])
        self.clean = self.token.double().sum(1)

    def split(self, condition: Tensor, text: Tensor) -> list[Tensor]:
        """Cut the pairs into passes of about `batch_tokens` tokens; pairs that start at the same block go together."""
        first = self.first_hits(condition, text)
        longest = self.ids.shape[1]
        start, least = _first((first < longest).T), first.amin(0)
        order = torch.argsort(start * longest + least, stable=True)
        size = (self.predicts.sum(1)[text] - least)[order]
        number = (size.cumsum(0) - size).div(self.batch_tokens, rounding_mode="floor")
        return list(torch.split(order, [n for n in torch.bincount(number).tolist() if n])) if len(order) else []

    def ablated(self, condition: Tensor, text: Tensor) -> Tensor:
        """NLL of `text` under `condition` (int64 `[pairs]` each), float64 `[pairs]`."""
        predicts = self.predicts[text]
        longest = predicts.shape[1]
        state = _State(torch.zeros_like(predicts), torch.zeros(0, device=predicts.device))
        since = torch.full((len(text),), longest, device=predicts.device)
        for layer, then in zip(self.layers, [*self.layers[1:], self.blocks], strict=True):
            hit = self.hits[layer][condition, text]
            before, since = since, torch.minimum(since, _first(hit))
            later = predicts & (self.position >= since.unsqueeze(1))
            # In this block no other token sees a change; from the next one on, all later tokens do.
            now = hit | (predicts & (self.position >= before.unsqueeze(1))) if self.in_place[layer] else later
            if then == layer + 1 or not torch.equal(now, later):
                state = self._run(state, range(layer, layer + 1), now, condition, text)
                layer += 1
            if layer < then:
                state = self._run(state, range(layer, then), later, condition, text)
        nll = self.token[text]
        wanted = state.tokens & self.target[text]
        next_ids = self.ids.roll(-1, 1)[text][wanted]
        nll[wanted] = stream_nll(self.model, state.hidden[wanted[state.tokens]], next_ids)
        self.keep(
            condition, text, state.tokens,
            lambda sampled: stream_outputs(self.model, state.hidden[sampled[state.tokens]]),
        )  # fmt: skip
        return nll.double().sum(1)

    def _run(self, state: "_State", layers: range, tokens: Tensor, condition: Tensor, text: Tensor) -> "_State":
        """Run `layers` over `tokens`; those that `state` lacks have the input of the clean pass."""
        row, position = tokens.nonzero(as_tuple=True)
        if not len(row):
            return state
        hidden = self.memory.hidden[layers[0]][text[row], position]
        if len(state.hidden):
            hidden[state.tokens[tokens]] = state.hidden
        edits = self.edits(layers, condition[row], self.content_mask[text[row], position])
        ran = partial.Tokens(row, position, text)
        self.computed += len(row) * len(layers)
        return _State(tokens, partial.partial_pass(self.model, self.memory, ran, hidden, layers, edits))


@dataclass(frozen=True)
class _State:
    """The residual stream `hidden` `[n, d]` of the n `tokens` (bool `[rows, longest]`) that were run."""

    tokens: Tensor
    hidden: Tensor


class _Whole(_Run):
    """Passes over whole texts, from the first hookpoint at which a token changes if the model `can_restart` there."""

    def __init__(self, model: Any, *batch: Any, can_restart: bool) -> None:
        super().__init__(model, *batch)
        recording = self.record_hits(torch.arange(self.ids.numel(), device=self.ids.device))
        with hooks.block_inputs(model, self.layers if can_restart else []) as hidden, hooks.editing(model, recording):
            found = outputs(model, self.ids, self.mask)
        self.clean = output_nll(model, found, self.ids, self.target[:, :-1]).double().sum(1)
        self.outputs = found[self.sampled]
        self.hidden = dict(hidden)

    def split(self, condition: Tensor, text: Tensor) -> list[Tensor]:
        """Cut the pairs into passes, each of which starts at one block."""
        start = _first((self.first_hits(condition, text) < self.ids.shape[1]).T)
        rows = max(1, self.batch_tokens // self.ids.shape[1])
        groups = [(start == number).nonzero().squeeze(1) for number in range(len(self.layers))]
        return [pairs for group in groups for pairs in torch.split(group, rows) if len(pairs)]

    def ablated(self, condition: Tensor, text: Tensor) -> Tensor:
        """NLL of `text` under `condition` (int64 `[pairs]` each), float64 `[pairs]`."""
        first = self.layers[int(_first((self.first_hits(condition, text) < self.ids.shape[1]).T)[0])]
        hidden = self.hidden[first][text] if first in self.hidden else None
        layers = range(0 if hidden is None else first, len(hooks.blocks(self.model)))
        is_content = self.content_mask[text]
        edits = self.edits(layers, condition.unsqueeze(1).expand_as(is_content).flatten(), is_content.flatten())
        self.computed += int(self.mask[text].sum()) * len(layers)
        with hooks.starting_at(self.model, first, hidden), hooks.editing(self.model, edits):
            found = outputs(self.model, self.ids[text], self.mask[text])
        self.keep(condition, text, self.target[text], lambda sampled: found[sampled])
        nll = output_nll(self.model, found, self.ids[text], self.target[text][:, :-1])
        return nll.double().sum(1)
