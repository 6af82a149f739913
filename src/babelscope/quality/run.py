"""Stage `quality`: how much of the model's loss on held-out text each SAE's reconstruction recovers, per language."""

import shutil

import polars as pl

from babelscope import sae
from babelscope.config import Config
from babelscope.core import stage
from babelscope.core.files import read_table, write_atomically, write_json
from babelscope.core.fingerprint import dvc_md5, fingerprint
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.core.resume import scratch
from babelscope.models import hardware, hookpoints, loading, matmul, tokens
from babelscope.quality.loss_recovered import loss_recovered


def run(params: Config, paths: Paths) -> None:
    """Measure the loss recovered at every hookpoint; writes `paths.loss_recovered` and the stage's metrics."""
    device = hardware.prepare(params.hardware)
    corpus = read_table(paths.texts).filter(split="eval")
    tokenizer = loading.load_tokenizer(params.model)
    of = dict(zip(corpus["text_id"], corpus["language"], strict=True))
    texts = tokens.by_length(
        tokens.within(
            tokens.tokenize(tokenizer, corpus["text_id"].to_list(), corpus["text"].to_list(), params.corpus.max_tokens),
            of,
            params.quality.tokens,
        )
    )
    saes = sae.SAECache(paths.saes, params.hookpoints, device)
    model = loading.load_model(params.model, params.ablate.dtype).to(device)
    matmul.use_in(model)
    hookpoints.resolve(model, params.hookpoints)

    targets = sum(max(len(text.ids) - max(text.special, 1), 0) for text in texts)
    knobs = params.model_dump(
        include={"ablate": {"dtype", "batch_tokens"}, "hookpoints": True, "model": True, "quality": True}
    )
    knobs["max_tokens"] = params.corpus.max_tokens
    keep = scratch(fingerprint("quality", knobs, {str(path): dvc_md5(path) for path in (paths.texts, paths.saes)}))
    with Progress("quality", targets, "tokens") as progress:
        found = loss_recovered(
            model, saes, texts, [of[text.text_id] for text in texts], params.languages, params.ablate.batch_tokens,
            keep=keep, advance=progress.update,
        )  # fmt: skip
    write_atomically(paths.loss_recovered, found.write_parquet)
    write_json(paths.metrics("quality"), figures(found))
    report(found)
    shutil.rmtree(keep, ignore_errors=True)


def figures(found: pl.DataFrame) -> dict[str, float]:
    """`loss_recovered/<hookpoint>`, `loss_recovered/<hookpoint>/<language>` where defined, and `nll_clean`."""
    defined = found.drop_nulls("loss_recovered").select("hookpoint", "language", "loss_recovered")
    numbers: dict[str, float] = {
        f"loss_recovered/{name}" + (f"/{language}" if language else ""): share
        for name, language, share in defined.iter_rows()
    }
    return numbers | {"nll_clean": found.filter(pl.col("language").is_null())["nll_clean"][0]}


def report(found: pl.DataFrame) -> None:
    """Log a line per hookpoint."""
    rows = []
    for name in found["hookpoint"].unique(maintain_order=True):
        whole, *each = found.filter(hookpoint=name).rows(named=True)
        shares = [(row["loss_recovered"], row["language"]) for row in each if row["loss_recovered"] is not None]
        least = [f"{100 * share:.2f} % {language}" for share, language in sorted(shares)[:1]] or ["-"]
        share = "-" if whole["loss_recovered"] is None else f"{100 * whole['loss_recovered']:.2f} %"
        rows.append([name, *(f"{whole[f'nll_{key}']:.4f}" for key in ("clean", "sae", "zero")), share, *least])
    stage.table(["hookpoint", "NLL", "with the SAE", "with zeros", "recovered", "least of a language"], rows)
