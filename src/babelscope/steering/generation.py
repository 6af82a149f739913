"""Steering: text generated while one language's features are amplified, from prompts that are the same for all.

`x <- x + strength * sum_u m_u W_dec[u]` at every hookpoint, with `m_u` the mean activation of u over the tokens of the
language, silent ones included: strength 1 adds what the language's features add, on average, to a token of its own
text. (Andrylie et al. 2025, arXiv 2507.11230, add multiples of the largest activation, all units at once, for
perplexity; with hundreds of units a language that is far from anything that the model has seen.)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
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


def push(added: Tensor, spared: int = 1) -> hooks.Edit:
    """The edit that adds `added[row]` (`[rows, d]`) to every position of a text but the first `spared`.

    Attention rests on the first position whatever the text, so the special tokens there (BOS) stay as they are. A pass
    over several positions is the prompt's; with a key-value cache every later pass is over one.
    """

    def edit(x: Tensor) -> Tensor:
        first = spared if x.shape[1] > 1 else 0
        return torch.cat([x[:, :first], (x[:, first:].float() + added.unsqueeze(1)).to(x.dtype)], dim=1)

    return edit


def generate(
    model: Any,
    prompts: Tensor,
    pushes: Mapping[str, Tensor],
    *,
    new_tokens: int,
    temperature: float,
    seed: int,
    special: int = 0,
    first_row: int = 0,
) -> Tensor:
    """Generate from every prompt while its row's vectors are added at the hookpoints.

    The model's own `generation_config` (repetition_penalty, top_k, ...) has no effect: tokens are drawn from the
    probabilities of the model, at `temperature`.

    Parameters
    ----------
    model: a causal language model.
    prompts: token ids, int64 `[rows, prompt tokens]`, two or more; all of one length, so that nothing is padded.
    pushes: by hookpoint, float32 `[rows, d]`.
    new_tokens: how many tokens to generate; the end of the text is not generated before.
    temperature: of the sampling; 0 takes the most probable token.
    seed: of the sampling.
    special: how many leading tokens of each prompt are special (BOS); they, and the first token in any case, are not
        pushed.
    first_row: number of the first row in the whole. A row's draws depend on `seed` and its number, not on the batch.

    Returns
    -------
    The generated tokens, int64 `[rows, new_tokens]`.
    """
    from transformers import GenerationConfig

    device = hooks.device_of(model)
    ids = prompts.to(device)
    edits = {name: push(added.to(device), max(special, 1)) for name, added in pushes.items()}
    draw = [] if temperature == 0 else [_sampler(temperature, seed, range(first_row, first_row + len(ids)))]
    theirs = model.generation_config
    # `generate` takes what a config leaves unset from the model's own, so that one is replaced.
    model.generation_config = GenerationConfig(eos_token_id=theirs.eos_token_id)
    try:
        with torch.inference_mode(), hooks.editing(model, edits):
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                pad_token_id=0, use_cache=True, do_sample=False, logits_processor=draw,
            )  # fmt: skip
    finally:
        model.generation_config = theirs
    generated: Tensor = out[:, ids.shape[1] :].cpu()
    return generated


def _sampler(temperature: float, seed: int, rows: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """Turn logits into scores whose largest is a token drawn from `softmax(logits / temperature)`.

    `logits / temperature - log(e)`, e exponential (Gumbel-max trick); every row has a generator of its own.
    """
    states = [int(np.random.SeedSequence([seed, row]).generate_state(1)[0]) for row in rows]
    generators = [torch.Generator().manual_seed(state) for state in states]

    def draw(_ids: Tensor, logits: Tensor) -> Tensor:
        noise = torch.empty(logits.shape)
        for row, generator in zip(noise, generators, strict=True):
            row.exponential_(generator=generator)
        noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()
        return logits.float() / temperature - noise.to(logits.device)

    return draw


def fluency(model: Any, prompts: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    """How likely the generated tokens are without steering, and how repetitive they are.

    Returns
    -------
    nll: nats per generated token, given the prompt, under the model as it is; float64 `[rows]`.
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


def judge(generations: pl.DataFrame, labels: Mapping[str, str], min_distinct: float, max_nll: float) -> pl.DataFrame:
    """`generations` with `success`: in the language that was amplified, and not degenerate.

    Parameters
    ----------
    generations: `language` (amplified; null: none), `predicted`, `nll`, `distinct_2`.
    labels: what `predicted` must be, by language; a language that is missing here cannot be judged: null.
    min_distinct, max_nll: distinct-2 at least, nats per token under the unsteered model at most.
    """
    wanted = pl.col("language").replace_strict(dict(labels), default=None, return_dtype=pl.String)
    fluent = (pl.col("distinct_2") >= min_distinct) & (pl.col("nll") <= max_nll)
    return generations.with_columns(
        success=(pl.col("predicted") == wanted) & fluent & wanted.is_not_null()
    ).with_columns(success=pl.when(wanted.is_not_null()).then(pl.col("success")))


def figures(judged: pl.DataFrame, labels: Mapping[str, str], min_distinct: float, max_nll: float) -> dict[str, float]:
    """Success and fluency per language at its best strength, and over all languages per strength.

    The best strength has the highest success, then the lowest NLL; it is chosen on the prompts that it is reported on.

    Parameters
    ----------
    judged: `language` (null: unsteered), `strength`, `control` (null: the language's own units), `predicted`, `nll`,
        `distinct_2`, `success`.
    labels, min_distinct, max_nll: as in `judge`.

    Returns
    -------
    `success`, `called` (in the language, degenerate or not), `nll`, `distinct_2`, `strength` of each `/<language>`;
    `success_unsteered/<language>` and, with a control, `success_control/<language>` at the same strength;
    `success_at/<strength>`, `nll_at/<strength>`; the means `success`, `success_unsteered`, `success_control`.
    """
    own = judged.filter(pl.col("language").is_not_null(), pl.col("control").is_null(), pl.col("success").is_not_null())
    plain, control = judged.filter(pl.col("language").is_null()), judged.filter(pl.col("control").is_not_null())
    called = pl.col("predicted") == pl.col("language").replace_strict(dict(labels), default=None)
    means = (pl.col("success").mean(), called.mean().alias("called"), pl.col("nll").mean(), pl.col("distinct_2").mean())
    table = own.group_by("language", "strength", maintain_order=True).agg(*means)
    best = table.sort("success", -pl.col("nll"), descending=True, maintain_order=True).unique(
        "language", keep="first", maintain_order=True
    )
    numbers: dict[str, float] = {}
    unsteered, controls = [], []
    for row in best.iter_rows(named=True):
        name = row.pop("language")
        numbers |= {f"{key}/{name}": float(value) for key, value in row.items()}
        fluent = (plain["distinct_2"] >= min_distinct) & (plain["nll"] <= max_nll)
        unsteered.append(float(((plain["predicted"] == labels[name]) & fluent).sum()) / max(len(plain), 1))
        numbers[f"success_unsteered/{name}"] = unsteered[-1]
        there = control.filter(pl.col("language") == name, pl.col("strength") == row["strength"])["success"]
        if len(there):
            controls.append(float(there.sum()) / len(there))
            numbers[f"success_control/{name}"] = controls[-1]
    for strength, success, nll in (
        own.group_by("strength").agg(pl.mean("success"), pl.mean("nll")).sort("strength").iter_rows()
    ):
        numbers |= {f"success_at/{strength:g}": success, f"nll_at/{strength:g}": nll}
    if len(best):
        numbers |= {
            "success": float(best["success"].sum()) / len(best),
            "success_unsteered": sum(unsteered) / len(best),
        }
    if controls:
        numbers["success_control"] = sum(controls) / len(controls)
    if len(plain):
        numbers |= {"nll_unsteered": float(plain["nll"].sum()) / len(plain),
                    "distinct_2_unsteered": float(plain["distinct_2"].sum()) / len(plain)}  # fmt: skip
    return numbers
