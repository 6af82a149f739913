"""Stage `explain`: nothing, unless `explain.endpoint` names one: then the first features of each language in words.

A language model behind an OpenAI-compatible endpoint says what the texts of a feature have in common, and then has to
tell from its own words in which further texts the feature fires (detection), and on which tokens (fuzzing).
"""

import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from babelscope import config
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_table, scratch, write_atomically, write_json
from babelscope.core.fingerprint import fingerprint
from babelscope.core.progress import Progress

CORPUS, FEATURES, SAES = Path("data/corpus/texts.parquet"), Path("data/scores/features.parquet"), Path("data/sae")
ACTIVATIONS, OUT, METRICS = Path("data/activations"), Path("data/explain"), Path("metrics/explain.json")
TOKENS = ACTIVATIONS / "tokens.parquet"
SCHEMA = {
    "hookpoint": pl.String, "layer": pl.Int32, "unit": pl.Int32, "language": pl.String, "explanation": pl.String,
    "detection": pl.Float64, "fuzzing": pl.Float64, "texts": pl.Int64,
}  # fmt: skip
# Texts in one question, and tokens of an answer: a sentence, or a list.
TOGETHER, SENTENCE, LIST = 5, 80, 40
# Bytes of an explanation: what is longer is cut, so that the cost of asking with it is bounded.
LONGEST = 8 * SENTENCE
log = logging.getLogger(__name__)


class Case(NamedTuple):
    """One feature: its row in `FEATURES`, and its texts as (pieces, activations)."""

    row: dict[str, Any]
    examples: list[tuple[list[str], list[float]]]
    active: list[tuple[list[str], list[float]]]
    silent: list[tuple[list[str], list[float]]]


def main() -> None:
    params = config.load()
    knobs = params.explain
    if knobs.endpoint is None:
        write([])
        log.info("explain: none to explain (params.yaml: explain.endpoint)")
        return
    work = fingerprint(
        "explain",
        # Every answer is kept under its request: other features or a higher max_cost ask only what is new.
        params.model_dump(include={"explain": {"endpoint", "model"}}),
        {},
    )
    from babelscope.explain.client import Client

    client = Client(knobs.endpoint, str(knobs.model), scratch(work), params.hardware.parallel)
    rows = ask(collect(params), client, params)
    write(rows)
    shutil.rmtree(scratch(work), ignore_errors=True)


def collect(params: config.Config) -> list[Case]:
    """The texts of the first features of every language, from the stored activations."""
    from babelscope import sae
    from babelscope.activations.store import ActivationStore, place
    from babelscope.browse.tables import cut
    from babelscope.explain.windows import windows
    from babelscope.features.pieces import by_piece
    from babelscope.models import hardware, loading, tokens

    knobs = params.explain
    device = hardware.prepare(params.hardware)
    # Where each layer has ranks of its own (score.per_layer), several features of a language have the same.
    order = pl.col("rank").rank("ordinal").over("language")
    first = read_table(FEATURES).filter(kind="sae").filter(order <= knobs.per_language)
    table = read_table(TOKENS).filter(split="train").select("row", "text_id")
    row = table["row"].to_torch()
    ends = table.with_row_index("at").group_by("text_id", maintain_order=True).agg(pl.col("at").min(), pl.len())
    spans = [(at, at + count) for _, at, count in ends.rows()]
    texts = ends.select("text_id").join(read_table(CORPUS), on="text_id", how="left", maintain_order="left")
    if texts["text"].null_count():
        raise UserError(f"{TOKENS}: holds texts that {CORPUS} lacks; run `dvc repro extract`")
    found: list[tuple[dict[str, Any], Any]] = []
    hookpoints = first["hookpoint"].unique(maintain_order=True).to_list()
    with Progress("explain, reading", len(row) * len(hookpoints), "tokens") as progress:
        for name in hookpoints:
            dictionary, mine = sae.load(SAES, name).to(device), first.filter(hookpoint=name)
            store = ActivationStore(place(ACTIVATIONS, dictionary.input_name(name)))
            chosen = windows(
                dictionary, mine["unit"].to_list(), lambda at, store=store: store.gather(row[at]), spans,  # type: ignore[misc]
                knobs.examples, knobs.scored, params.seed, progress.update,
            )  # fmt: skip
            found += zip(mine.iter_rows(named=True), chosen, strict=True)
    tokenizer = loading.load_tokenizer(params.model)
    used = sorted({one.text for _, chosen in found for part in chosen for one in part})
    shown = texts[used]
    in_pieces = cut(shown, tokens.spelled(tokenizer, shown["text"].to_list(), params.corpus.max_tokens))
    of = dict(zip(used, in_pieces.select("pieces", "piece").rows(), strict=True))

    def side(some: Any) -> list[tuple[list[str], list[float]]]:
        return [(of[one.text][0], by_piece(one.activations, of[one.text][1], len(of[one.text][0]))) for one in some]

    return [Case(features, *map(side, chosen)) for features, chosen in found]


def ask(cases: list[Case], client: Any, params: config.Config) -> list[tuple[Any, ...]]:
    """Explain and score; before the first question, what it all will cost is logged, and refused if it is too much."""
    import numpy as np

    from babelscope.explain import prompts
    from babelscope.explain.client import Request
    from babelscope.explain.scores import balanced_accuracy, fuzzed

    def largest(case: Case) -> float:
        return max(value for _, activations in case.examples for value in activations)

    questions = [Request(prompts.explain(case.examples, largest(case)), SENTENCE) for case in cases]
    tests: list[tuple[int, str, bool, str]] = []  # feature, task, truth, text
    for number, case in enumerate(cases):
        for truth, side in ((True, case.active), (False, case.silent)):
            tests += [(number, prompts.DETECT, truth, "".join(pieces)) for pieces, _ in side]
        for place, (pieces, activations) in enumerate(case.active):
            on = [value > 0 for value in activations]
            tests.append((number, prompts.FUZZ, True, prompts.marked(pieces, on)))
            wrong = fuzzed(on, [params.seed, case.row["unit"], place])
            tests.append((number, prompts.FUZZ, False, prompts.marked(pieces, wrong)))
    groups = []
    for number in range(len(cases)):
        for task in (prompts.DETECT, prompts.FUZZ):
            mine = [test for test in tests if test[:2] == (number, task)]
            # Else those that are true would stand together, in their order.
            order = np.random.default_rng([params.seed, number]).permutation(len(mine)).tolist()
            groups += [[mine[i] for i in order[at : at + TOGETHER]] for at in range(0, len(mine), TOGETHER)]

    def judged(explanations: list[str]) -> list[Request]:
        return [
            Request(prompts.judge(some[0][1], explanations[some[0][0]], [text for *_, text in some]), LIST)
            for some in groups
        ]

    announce(questions + judged(["x" * LONGEST] * len(cases)), params)
    with Progress("explain", len(questions) + len(groups), "requests") as progress:
        explanations = [short(answer) for answer in client.ask(questions, progress.update)]
        answers = client.ask(judged(explanations), progress.update)
    said: dict[tuple[int, str], list[tuple[bool, bool | None]]] = {}
    for some, answer in zip(groups, answers, strict=True):
        verdicts = prompts.verdicts(answer, len(some))
        for place, (number, task, truth, _) in enumerate(some):
            verdict = None if verdicts is None else verdicts[place]
            said.setdefault((number, task), []).append((truth, verdict))
    rows = []
    for number, (case, explanation) in enumerate(zip(cases, explanations, strict=True)):
        pairs = [said.get((number, task), []) for task in (prompts.DETECT, prompts.FUZZ)]
        scores = [balanced_accuracy([t for t, _ in some], [v for _, v in some]) for some in pairs]
        read = sum(verdict is not None for some in pairs for _, verdict in some)
        keys = (case.row[key] for key in ("hookpoint", "layer", "unit", "language"))
        rows.append((*keys, explanation, *scores, read))
    return rows


def short(answer: str) -> str:
    """An explanation in one line of at most `LONGEST` bytes."""
    return " ".join(answer.split()).encode()[:LONGEST].decode(errors="ignore")


def announce(everything: list[Any], params: config.Config) -> None:
    """Log what the requests will cost at most.

    Raises
    ------
    UserError: more than `explain.max_cost`.
    """
    from babelscope.explain.client import tokens

    knobs = params.explain
    sent, back = tokens(everything)
    cost = (sent * knobs.price_in + back * knobs.price_out) / 1e6
    log.info(
        "explain: %d requests, at most %d tokens sent (one a byte) and %d back: %.2f at most, if none is repeated",
        len(everything), sent, back, cost,
    )  # fmt: skip
    if cost > knobs.max_cost:
        raise UserError(
            f"params.yaml: explain.max_cost: this would cost up to {cost:.2f}; allowed: {knobs.max_cost}. Raise it, or "
            "lower explain.per_language, examples or scored"
        )


def write(rows: list[tuple[Any, ...]]) -> None:
    table = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    write_atomically(OUT / "explanations.parquet", table.write_parquet)
    means = {name: table[name].mean() for name in ("detection", "fuzzing")}
    write_json(METRICS, {"features": len(table)} | {name: mean for name, mean in means.items() if mean is not None})
    if len(table):
        by_language = table.group_by("language", maintain_order=True)
        shown = by_language.agg(pl.len(), pl.col("detection").mean().round(3), pl.col("fuzzing").mean().round(3))
        stage.table(["language", "explained", "detection", "fuzzing"], shown.rows())


if __name__ == "__main__":
    stage.run(main)
