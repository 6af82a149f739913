"""Reads a sentence: which language-specific features fire on which tokens, and which language they identify."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor

from babelscope import sae
from babelscope.config import Config
from babelscope.core.errors import UserError
from babelscope.core.files import read_table
from babelscope.core.paths import Paths
from babelscope.corpus.lid import FastText
from babelscope.identification.classify import identify
from babelscope.identification.unit_totals import UnitTotals, owned
from babelscope.models import forward, hardware, loading, tokens
from babelscope.models.pieces import by_piece, pieces
from babelscope.models.top_tokens import TopTokens
from babelscope.report.browser import is_right_to_left
from babelscope.report.parts import layer_labels
from babelscope.steering import generation
from babelscope.steering.vectors import of_features

log = logging.getLogger(__name__)

# The largest strength of a continuation, in multiples of what the features add on average.
STRONGEST = 16.0


@dataclass(frozen=True)
class Feature:
    """A selected latent.

    Attributes
    ----------
    id: `hookpoint/unit`, as in the feature browser.
    label: a shorter name, `layer/unit` if no two hookpoints share a layer.
    effective: effective number of languages, exp of the entropy of its firing rates.
    largest: its largest activation on a training text.
    typical: its mean activation on the tokens of its first language on which it fires.
    """

    id: str
    label: str
    languages: list[str]
    rank: int
    effective: float
    largest: float
    typical: float


class Firing(NamedTuple):
    """A feature on a piece of the text: its number, and its activation as a share of its largest one."""

    feature: int
    share: float


@dataclass(frozen=True)
class Reading:
    """What a sentence shows.

    Attributes
    ----------
    pieces: the text cut at the borders of its tokens (see `models.pieces`).
    fires: the features that fire on each piece, the strongest first.
    language: the one whose features fire most, or None if none fires.
    scores: firings per feature of each language.
    fasttext: fastText's language and its probability.
    left_out: whether the text was cut at `corpus.max_tokens`.
    right_to_left: whether most letters are written from right to left.
    """

    pieces: list[str]
    fires: list[list[Firing]]
    language: str | None
    scores: dict[str, float]
    fasttext: tuple[str, float]
    left_out: bool
    right_to_left: bool


class Reader:
    """The model, its SAEs and the selected features, kept in memory to read one sentence after the other.

    The precision is that of stage `extract`, so that a text of the corpus gives the firings that `encode` counted.

    Raises
    ------
    UserError: an output of an earlier stage is missing, or no feature was selected.
    """

    def __init__(self, params: Config, paths: Paths) -> None:
        selected = read_table(paths.features).filter(kind="sae").sort("rank", maintain_order=True)
        if selected.is_empty():
            raise UserError(
                f"{paths.features}: no features; lower score.example_rate or score.token_rate (params.yaml)"
            )
        self.params, self.device = params, hardware.prepare(params.hardware)
        self.hookpoints = [name for name in params.hookpoints if name in set(selected["hookpoint"])]
        self.saes = sae.SAECache(paths.saes, self.hookpoints, self.device)
        self.features: list[Feature] = []
        self._number: dict[str, Tensor] = {}  # by hookpoint: each latent's number in `features`, or -1
        self._means: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
        self._owners = {}
        for name in self.hookpoints:
            rows, counts = selected.filter(hookpoint=name), read_table(paths.counts(name))
            self._owners[name] = owned(rows, counts, params.languages)
            self._add(name, rows, counts, read_table(paths.totals(name)))
        owned_units = selected["language"].to_list()
        self.units = {name: owned_units.count(name) for name in params.languages if name in owned_units}
        self.tokenizer, self.lid = loading.load_tokenizer(params.model), FastText()
        self.model = loading.load_model(params.model, params.extract.dtype).to(self.device)
        self._top = TopTokens(self.model, screen=False)

    def _add(self, hookpoint: str, rows: pl.DataFrame, counts: pl.DataFrame, totals: pl.DataFrame) -> None:
        """Add the features of one hookpoint, whose selection is `rows`."""
        label = layer_labels(self.params.hookpoints)[hookpoint]
        largest = counts.group_by("unit").agg(largest=pl.col("max").max())
        means = rows.select("unit", "language").join(counts, on=["unit", "language"], how="left").join(
            totals.select("language", every="tokens"), on="language", how="left"
        )  # fmt: skip
        for (language,), part in means.group_by("language", maintain_order=True):
            mean = (part["sum"] / part["every"]).to_list()
            self._means[hookpoint, str(language)] = part["unit"].to_list(), mean
        own = means.group_by("unit", maintain_order=True).agg(typical=(pl.col("sum") / pl.col("tokens")).first())
        table = rows.group_by("unit", maintain_order=True).agg(
            pl.col("language"), pl.col("rank").min(), pl.col("entropy").first()
        ).join(largest, on="unit", maintain_order="left").join(own, on="unit", maintain_order="left")  # fmt: skip
        self._number[hookpoint] = torch.full((self.saes[hookpoint].latents,), -1, dtype=torch.int64)
        for row in table.with_columns(pl.col("entropy").exp()).iter_rows(named=True):
            unit = row["unit"]
            self._number[hookpoint][unit] = len(self.features)
            self.features.append(
                Feature(
                    f"{hookpoint}/{unit}", f"{label}/{unit}", row["language"], row["rank"], row["entropy"],
                    row["largest"], row["typical"],
                )
            )  # fmt: skip

    def tokenize(self, text: str) -> tokens.TokenizedText:
        """The first `corpus.max_tokens` tokens of a text.

        Raises
        ------
        UserError: it has none.
        """
        [found] = tokens.tokenize(self.tokenizer, ["text"], [text], self.params.corpus.max_tokens)
        if not text.strip() or not found.content_tokens:
            raise UserError("the text has no tokens; allowed: at least one word")
        return found

    @torch.inference_mode()
    def read(self, text: str) -> Reading:
        """Run the model over a text once, and encode every token at every hookpoint.

        Raises
        ------
        UserError: the text has no tokens.
        """
        tokenized = self.tokenize(text)
        [(spelled, spans)] = tokens.spelled(self.tokenizer, [text], self.params.corpus.max_tokens)
        parts, piece = pieces(spelled, spans)
        reads = {name: self.saes[name].input_name(name) for name in self.hookpoints}
        batch = tuple(part.to(self.device) for part in forward.collate([tokenized]))
        dtype = loading.DTYPES[self.params.extract.store_dtype]
        rows = forward.content_activations(self.model, list(reads.values()), batch, dtype)  # type: ignore[arg-type]
        totals = UnitTotals(1, self._owners, self.saes, self.device)
        fires: list[list[Firing]] = [[] for _ in parts]
        for name, at in reads.items():
            totals.add(name, rows[at], torch.zeros(len(piece), dtype=torch.int64))
            for number, activations in self._firings(name, rows[at]).items():
                largest = self.features[number].largest
                for place, value in enumerate(by_piece(activations, piece, len(parts))):
                    if value > 0:
                        fires[place].append(Firing(number, value / largest))
        table = pl.DataFrame(totals.totals["sae-count"].numpy(), schema=self.params.languages)
        found = identify(table.with_row_index("text"), self.units)
        scores = {name: table[name][0] / count for name, count in self.units.items()}
        predicted, probability = self.lid.predict([text]).row(0)
        return Reading(
            pieces=parts,
            fires=[sorted(one, key=lambda firing: -firing.share) for one in fires],
            language=found["predicted"][0] if max(scores.values()) > 0 else None,
            scores={name: scores[name] for name in sorted(scores, key=lambda name: -scores[name])},
            fasttext=(predicted, probability),
            left_out=len("".join(parts)) < len(spelled.rstrip()),
            right_to_left=is_right_to_left(text),
        )

    def _firings(self, hookpoint: str, x: Tensor) -> dict[int, list[float]]:
        """Activations on every token, by number of the features that fire at all. `x`: `[tokens, d]`."""
        values, indices = (part.cpu() for part in self.saes[hookpoint].encode(x))
        numbers = self._number[hookpoint][indices]
        row, column = ((values > 0) & (numbers >= 0)).nonzero(as_tuple=True)
        found: dict[int, list[float]] = {}
        for token, number, value in zip(
            row.tolist(), numbers[row, column].tolist(), values[row, column].tolist(), strict=True
        ):
            found.setdefault(number, [0.0] * len(x))[token] = value
        return found

    def vectors(self, target: str) -> dict[str, Tensor]:
        """By hookpoint, what strength 1 adds to every token, float32 `[1, d]`.

        For a language, it is what its features add on average to a token of its own text (as in stage `steer`). For
        a feature (its `id`), it is what the feature adds to a token of its language on which it fires.

        Raises
        ------
        UserError: no feature belongs to `target`, and none has that id.
        """
        for one in self.features:
            if one.id == target:
                hookpoint, _, unit = target.rpartition("/")
                return {hookpoint: self._direction(hookpoint, [int(unit)], [one.typical])}
        found = {name: self._direction(name, *self._means[name, target])
                 for name in self.hookpoints if (name, target) in self._means}  # fmt: skip
        if not found:
            raise UserError(f"{target!r} has no features; allowed: {', '.join(self.units)}, or the id of a feature")
        return found

    def _direction(self, hookpoint: str, units: Sequence[int], means: Sequence[float]) -> Tensor:
        return of_features(self.saes[hookpoint], units, means).unsqueeze(0)  # type: ignore[arg-type]

    def continuation(self, text: str, target: str, strength: float) -> str:
        """The model's continuation of `text` with `strength` times `vectors(target)` added at every token.

        The length, the temperature and the seed are those of stage `steer`: only the steering changes the text.
        """
        tokenized, section = self.tokenize(text), self.params.steer
        added = {name: strength * vector for name, vector in self.vectors(target).items()} if strength else {}
        generated = generation.generate(
            self._top, [tokenized.ids], {name: generation.Change(vector) for name, vector in added.items()},
            special=tokenized.special, new_tokens=section.new_tokens, temperature=[section.temperature],
            seeds=[[self.params.seed]],
        )  # fmt: skip
        whole, before = (
            str(self.tokenizer.decode(ids, skip_special_tokens=True))
            for ids in ([*tokenized.ids, *generated[0].tolist()], list(tokenized.ids))
        )
        return whole[len(before) :]
