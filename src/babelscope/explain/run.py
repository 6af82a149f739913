"""Stage `explain`: a language model explains the first features of each language, if `explain.endpoint` is set.

A model behind an OpenAI-compatible endpoint says what the texts of a feature have in common. From this explanation it
then predicts in which further texts the feature fires (detection), and on which tokens (fuzzing).
"""

import logging
from collections.abc import Sequence
from typing import Any

import polars as pl

from babelscope.config import Config
from babelscope.core import resume, stage
from babelscope.core.files import write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress

SCHEMA = {
    "hookpoint": pl.String, "layer": pl.Int32, "unit": pl.Int32, "language": pl.String, "explanation": pl.String,
    "detection": pl.Float64, "fuzzing": pl.Float64, "texts": pl.Int64,
}  # fmt: skip
# Bytes of an explanation (8 a token). Longer ones are cut, which bounds the cost of the requests with them.
LONGEST = 640
log = logging.getLogger(__name__)


def run(params: Config, paths: Paths) -> None:
    """Write `paths.explanations` and the stage's metrics; without an endpoint, a table without rows."""
    endpoint = params.explain.endpoint
    if endpoint is None:
        write([], paths)
        log.info("explain: none to explain (params.yaml: explain.endpoint)")
        return
    from babelscope.core.endpoint import Client
    from babelscope.explain.texts import collect  # imports torch

    # Answers are kept by request: with other features or a higher max_cost, only new requests are sent.
    with resume.kept("explain", params.model_dump(include={"explain": {"endpoint", "model"}}), []) as folder:
        client = Client(endpoint, str(params.explain.model), folder, params.hardware.parallel)
        write(ask(collect(params, paths), client, params), paths)


def ask(cases: Sequence[Any], client: Any, params: Config) -> list[tuple[Any, ...]]:
    """Explain and score the cases; `check_cost` comes before the first request."""
    from babelscope.core.endpoint import check_cost
    from babelscope.explain.scores import judge, scores, trials

    questions = [case.question() for case in cases]
    groups = [group for number, case in enumerate(cases) for group in trials(number, case, params.seed)]
    requests = questions + [judge(group, "x" * LONGEST) for group in groups]
    check_cost(requests, params.explain, "explain", "explain.per_language, examples or scored")
    with Progress("explain", len(questions) + len(groups), "requests") as progress:
        explanations = [short(answer) for answer in client.ask(questions, progress.update)]
        answers = client.ask([judge(group, explanations[group[0].case]) for group in groups], progress.update)
    results = zip(cases, explanations, scores(groups, answers, len(cases)), strict=True)
    return [(*(case.row[key] for key in list(SCHEMA)[:4]), words, *figures) for case, words, figures in results]


def short(answer: str) -> str:
    """An explanation in one line of at most `LONGEST` bytes."""
    return " ".join(answer.split()).encode()[:LONGEST].decode(errors="ignore")


def write(rows: list[tuple[Any, ...]], paths: Paths) -> None:
    """Write the table and the metrics, and log the mean scores of each language."""
    table = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    write_atomically(paths.explanations, table.write_parquet)
    means = {name: table[name].mean() for name in ("detection", "fuzzing")}
    metrics = {"features": len(table)} | {name: mean for name, mean in means.items() if mean is not None}
    write_json(paths.metrics("explain"), metrics)
    if len(table):
        by_language = table.group_by("language", maintain_order=True)
        shown = by_language.agg(pl.len(), pl.col("detection").mean().round(3), pl.col("fuzzing").mean().round(3))
        stage.table(["language", "explained", "detection", "fuzzing"], shown.rows())
