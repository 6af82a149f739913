"""Answers to prompts under vectors, batch by batch, with what is made of each."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from babelscope.core import resume
from babelscope.corpus import lid
from babelscope.models.top_tokens import TopTokens
from babelscope.steering import generation, judge
from babelscope.steering.prompts import Prompt
from babelscope.steering.vectors import Vectors

ROWS = {"method": pl.String, "language": pl.String, "place": pl.String, "strength": pl.Float64, "slot": pl.Int64,
        "prompt": pl.Int64, "temperature": pl.Float64}  # fmt: skip


@dataclass
class Judge:
    """What answers are compared with.

    Attributes
    ----------
    identifier: fastText.
    label: its label of each language.
    place: where the texts are embedded (`judge.embed`).
    mean: the mean state of each language there, `[d]`.
    asked: the embeddings of the prompts, without the mean of their language, `[prompts, d]`.
    pool: see `judge.relevant`.
    texts: of the prompts.
    endpoint: says instead of the embeddings whether an answer is relevant; None: they do.
    """

    identifier: lid.FastText
    label: Mapping[str, str]
    place: str
    mean: Mapping[str, Tensor]
    asked: Tensor
    pool: Tensor
    texts: Sequence[str]
    endpoint: judge.Endpoint | None = None

    def __call__(self, rows: pl.DataFrame, embeddings: Tensor) -> pl.DataFrame:
        """`rows` (`language`, `prompt`, `text`) with `predicted`, `forced` (null: no target) and `relevant`."""
        predicted = self.identifier.predict(rows["text"].to_list())["predicted"]
        language = {label: name for name, label in self.label.items()}
        if self.endpoint is not None:
            relevant = self.endpoint([self.texts[number] for number in rows["prompt"]], rows["text"].to_list())
        else:
            answers = judge.centred(embeddings, [language.get(name) for name in predicted], self.mean)
            relevant = judge.relevant(answers, self.asked, rows["prompt"].to_torch(), self.pool).tolist()
        wanted = pl.col("language").replace_strict(dict(self.label), default=None, return_dtype=pl.String)
        return rows.with_columns(predicted=predicted, relevant=pl.Series(relevant, dtype=pl.Boolean)).with_columns(
            forced=pl.col("predicted") == wanted
        )


@dataclass
class Answers:
    """Generates answers and has them judged.

    Attributes
    ----------
    top: of the model.
    tokenizer: the model's.
    vectors: by method, place and language.
    prompts: the prompts that the column `prompt` numbers.
    judge: of the answers.
    new_tokens: tokens of an answer.
    batch_rows: answers at once.
    batch_tokens: tokens in one pass of the unsteered model.
    seed: of the sampling.
    folder: keeps finished batches.
    """

    top: TopTokens
    tokenizer: Any
    vectors: Vectors
    prompts: Sequence[Prompt]
    judge: Judge
    new_tokens: int
    batch_rows: int
    batch_tokens: int
    seed: int
    folder: Path

    def __call__(
        self, title: str, rows: pl.DataFrame, with_nll: Sequence[bool] = (), ids: Sequence[Sequence[int]] = ()
    ) -> pl.DataFrame:
        """The answers of `rows` (`ROWS`), in their order.

        Parameters
        ----------
        title: of the progress; also part of the name of the folder that keeps the batches.
        rows: one answer each. A row is steered if there is a vector of its method, place and language.
        with_nll: for which rows the NLL is computed; empty: for none.
        ids: what the model is given in each row; empty: the ids of the row's prompt.

        Returns
        -------
        `rows` with `text`, `predicted`, `forced`, `relevant`, `distinct_2`, `nll` (nats/token; null: not computed).
        """
        given = list(ids) or [self.prompts[number].ids for number in rows["prompt"]]
        wanted = list(with_nll) or [False] * len(rows)
        # Prompts of one length need no padding.
        order = sorted(range(len(rows)), key=lambda number: (len(given[number]), given[number], number))
        # Of equal size, since a step of few answers takes almost as long as one of many.
        count = -(-len(rows) // self.batch_rows)
        batches = [order[len(rows) * i // count : len(rows) * (i + 1) // count] for i in range(count)]

        def compute(batch: list[int]) -> dict[str, Tensor]:
            return self._batch(rows[batch], [given[number] for number in batch], [wanted[number] for number in batch])

        folder = self.folder / title.replace(" ", "-")
        parts = list(resume.parts(f"steer: {title}", batches, compute, folder, unit="answers"))
        place = torch.tensor(order).argsort()
        whole = {key: torch.cat([part[key] for part in parts])[place] for key in parts[0]}
        found = rows.with_columns(
            text=pl.Series(self.tokenizer.batch_decode(whole["generated"], skip_special_tokens=True), dtype=pl.String),
            distinct_2=pl.Series(generation.distinct_2(whole["generated"]), dtype=pl.Float64),
            nll=pl.Series(whole["nll"].numpy(), dtype=pl.Float64).fill_nan(None),
        )
        return self.judge(found, whole["embedding"])

    def _batch(self, rows: pl.DataFrame, given: list[Sequence[int]], wanted: list[bool]) -> dict[str, Tensor]:
        changes = {place: generation.Change(added) for place, added in self._added(rows).items()}
        special = self.prompts[0].special
        names = rows.select("method", "language", "place").rows()
        codes = [zlib.crc32("/".join(name or "" for name in row).encode()) for row in names]
        generated = generation.generate(
            self.top, given, changes, special=len(special), new_tokens=self.new_tokens,
            temperature=rows["temperature"].to_list(),
            seeds=[[self.seed, code, prompt] for code, prompt in zip(codes, rows["prompt"], strict=True)],
        )  # fmt: skip
        nll = torch.full((len(rows),), torch.nan, dtype=torch.float64)
        chosen = [number for number, asked in enumerate(wanted) if asked]
        if chosen:
            nll[chosen] = generation.continuation_nll(
                self.top.model, [given[number] for number in chosen], generated[chosen]
            )
        texts, which = torch.unique(generated, dim=0, return_inverse=True)  # weak vectors often change nothing
        embedding = judge.embed(self.top.model, self.judge.place, texts.tolist(), special, self.batch_tokens)[which]
        return {"generated": generated.contiguous(), "nll": nll, "embedding": embedding}

    def _added(self, rows: pl.DataFrame) -> dict[str, Tensor]:
        """By place, what is added to each row's states: the language's vector less the prompt language's, `[rows, d]`.

        Where a method has no vector of the prompt's language, the language's alone is added.
        """
        found: dict[str, Tensor] = {}
        for number, (method, language, place, strength, prompt) in enumerate(
            rows.select("method", "language", "place", "strength", "prompt").iter_rows()
        ):
            vectors = self.vectors.get(method, {}).get(place, {})
            if language in vectors:
                vector, away = vectors[language], vectors.get(self.prompts[prompt].language)
                table = found.setdefault(place, torch.zeros((len(rows), len(vector))))
                table[number] = strength * (vector if away is None else vector - away)
        device = next(self.top.model.parameters()).device
        return {place: table.to(device) for place, table in found.items()}
