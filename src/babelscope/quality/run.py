"""Stage `quality`: how much of the model's loss on held-out text each SAE's reconstruction recovers, per language."""

import polars as pl

from babelscope import sae
from babelscope.config import Config
from babelscope.core import resume, stage
from babelscope.core.files import read_table, write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.models import hardware, loading, matmul, tokens
from babelscope.quality.loss_recovered import loss_recovered


def run(params: Config, paths: Paths) -> None:
    """Measure the loss recovered at every hookpoint; write `paths.loss_recovered` and the stage's metrics."""
    device = hardware.prepare(params.hardware)
    corpus = read_table(paths.texts).filter(split="eval")
    tokenizer = loading.load_tokenizer(params.model)
    measured = tokens.texts_of(corpus, tokenizer, params.quality.tokens, params.corpus.max_tokens, cut=True)
    saes = sae.SAECache(paths.saes, params.hookpoints, device)
    model = loading.load_model(params.model, params.ablate.dtype).to(device)
    matmul.use_in(model)

    depends = params.model_dump(
        include={"ablate": {"dtype", "batch_tokens"}, "hookpoints": True, "model": True, "quality": True}
    )
    depends["max_tokens"] = params.corpus.max_tokens
    with resume.kept("quality", depends, [paths.texts, paths.saes]) as folder:
        found = loss_recovered(model, saes, *measured, params.languages, params.ablate.batch_tokens, keep=folder)
        write_atomically(paths.loss_recovered, found.write_parquet)
        write_json(paths.metrics("quality"), figures(found))
    report(found)


def figures(found: pl.DataFrame) -> dict[str, float]:
    """`loss_recovered/<hookpoint>` and `loss_recovered/<hookpoint>/<language>` where defined, and `nll_clean`.

    `loss_recovered_low/<hookpoint>`, `loss_recovered_high/<hookpoint>`: the ends of the 95 % interval.
    """
    defined = found.drop_nulls("loss_recovered").select("hookpoint", "language", "loss_recovered")
    shares = {"/".join(filter(None, ("loss_recovered", *key))): share for *key, share in defined.iter_rows()}
    whole = found.filter(pl.col("language").is_null())
    for name, low, high in whole.drop_nulls("low").select("hookpoint", "low", "high").iter_rows():
        shares |= {f"loss_recovered_low/{name}": low, f"loss_recovered_high/{name}": high}
    return shares | {"nll_clean": whole["nll_clean"][0]}


def report(found: pl.DataFrame) -> None:
    """Log a line per hookpoint."""
    rows = []
    for (name,), table in found.group_by("hookpoint", maintain_order=True):
        whole, *each = table.rows(named=True)
        shares = [(row["loss_recovered"], row["language"]) for row in each if row["loss_recovered"] is not None]
        least = [f"{100 * share:.2f} % {language}" for share, language in sorted(shares)[:1]] or ["-"]
        share, *ends = (
            "-" if whole[key] is None else f"{100 * whole[key]:.1f}" for key in ("loss_recovered", "low", "high")
        )
        nlls = (f"{whole[f'nll_{key}']:.4f}" for key in ("clean", "sae", "zero"))
        rows.append([name, *nlls, f"{share} %", " to ".join(ends), *least])
    stage.table(["hookpoint", "NLL", "with the SAE", "with zeros", "recovered", "95 %", "least of a language"], rows)
