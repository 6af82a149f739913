"""One pass over texts in memory, for use without the pipeline: how often every latent fires on every language."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars
import torch

from babelscope.features.counter import Counter
from babelscope.models.forward import collate, own_activations
from babelscope.models.hookpoints import device_of, layer_of
from babelscope.models.tokens import TokenizedText, batches
from babelscope.sae import SAE


@torch.inference_mode()
def scan(
    model: Any,
    saes: Mapping[str, SAE],
    texts: Sequence[TokenizedText],
    language: Mapping[str, str],
    batch_tokens: int = 2048,
) -> tuple[dict[str, polars.DataFrame], polars.DataFrame]:
    """Count the firings of every latent, as `extract` and `encode` do through files.

    Parameters
    ----------
    model: a causal language model.
    saes: by hookpoint, on the model's device.
    texts: in `by_length` order.
    language: of every text, by its `text_id`.
    batch_tokens: tokens in one forward pass.

    Returns
    -------
    By hookpoint `layer`, `unit`, `language`, `tokens`, `texts`, `sum`, `max`, `min_positive` (see `Counter.frame`), and
    the totals: `language`, `tokens`, `texts`. What `scoring.sae_lape` takes.

    Raises
    ------
    UserError: the model has no such hookpoint, or an activation is not finite.
    """
    names, device = sorted(set(language.values())), device_of(model)
    counters = {name: Counter(names, sae.latents, device) for name, sae in saes.items()}
    for batch in batches(texts, batch_tokens):
        inputs = collate(batch)
        seen = own_activations(model, list(saes), tuple(part.to(device) for part in inputs), torch.float32)  # type: ignore[arg-type]
        own = torch.tensor([text.own for text in batch])
        code = torch.tensor([names.index(language[text.text_id]) for text in batch]).repeat_interleave(own).to(device)
        number = torch.arange(len(batch)).repeat_interleave(own).to(device)
        for name, sae in saes.items():
            counters[name].add(*sae.encode(seen[name]), code, number)
    of = polars.DataFrame({"language": [language[text.text_id] for text in texts], "tokens": [t.own for t in texts]})
    totals = of.group_by("language").agg(polars.col("tokens").sum(), texts=polars.len().cast(polars.Int64))
    return {name: counter.frame(layer_of(name)) for name, counter in counters.items()}, totals.sort("language")
