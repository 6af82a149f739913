"""The verdict: five sentences on what holds and what does not, made from metrics/*.json alone.

The report opens with them, and `text` gives the same for a README or a terminal.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from babelscope.report.names import name
from babelscope.report.numbers import percent, plain, significant

Metrics = Mapping[str, Mapping[str, Any]]
HOLDS, IN_PART, FAILS, UNKNOWN = "holds", "holds in part", "does not hold", "not measured"
# A claim about the languages holds if it is true of this share of them, and in part above the second share.
MOST, SOME = 0.8, 0.5
# The default's aim: half of a language's features fire as if on at most so many languages.
SPECIFIC = 2.0
_RESAMPLES = 2000


@dataclass(frozen=True)
class Sentence:
    """A claim, whether it holds, and the sentence about it, in which figures are between double asterisks."""

    claim: str
    status: str
    markdown: str

    @property
    def text(self) -> str:
        """The sentence without markup."""
        return self.markdown.replace("**", "")

    @property
    def html(self) -> Markup:
        """The sentence as HTML, with its figures in bold."""
        parts = [escape(part) for part in self.markdown.split("**")]
        return Markup("").join(Markup("<strong>{}</strong>").format(p) if i % 2 else p for i, p in enumerate(parts))


def text(metrics: Metrics, languages: Sequence[str]) -> str:
    """The five sentences as a Markdown list."""
    return "\n".join(f"- **{one.claim}** ({one.status}). {one.markdown}" for one in sentences(metrics, languages))


def sentences(metrics: Metrics, languages: Sequence[str]) -> list[Sentence]:
    """The five sentences; one whose figures are missing says so.

    `metrics` is metrics/<name>.json by name.
    """
    claims = {
        "Languages have features of their own": _features, "The features matter to their language": _effect,
        "More than random latents do": _control, "They identify the language of a text": _identification,
        "Another seed finds them again": _stability,
    }  # fmt: skip
    found = []
    for claim, judge in claims.items():
        judged = judge(metrics, languages)
        found.append(Sentence(claim, *(judged or (UNKNOWN, "The stage that measures this has not run."))))
    return found


def wilson(share: float, total: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `total` cases, in 0..1 (Wilson 1927, eq. 7)."""
    z = 1.959963984540054  # the 97.5 % quantile of the normal distribution
    middle, half = share + z * z / (2 * total), z * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2))
    return max(0.0, (middle - half) / (1 + z * z / total)), min(1.0, (middle + half) / (1 + z * z / total))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean: percentile bootstrap over `values` (Efron 1979), always the same."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), size=(_RESAMPLES, len(values)))
    low, high = np.quantile(drawn.mean(1), (0.025, 0.975))
    return float(low), float(high)


def _features(metrics: Metrics, languages: Sequence[str]) -> tuple[str, str] | None:
    score = metrics.get("score", {})
    counts, total = _by_language(score, "features", languages), score.get("features")
    if not counts or total is None:
        return None
    most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    owners = sum(count > 0 for count in counts.values())
    median = score.get("effective_languages_median")
    status = _status(owners / len(languages))
    if status == HOLDS and median is not None and median > SPECIFIC:
        status = IN_PART
    sentence = (
        f"**{owners} of {len(languages)}** languages have features: **{plain(total)}** latents, from "
        f"{plain(counts[least])} ({name(least)}) to {plain(counts[most])} ({name(most)}) a language"
    )
    if median is not None:
        each = [value for value in _by_language(score, "effective_languages_median", languages).values() if value]
        spread = f" ({plain(min(each), 2)} to {plain(max(each), 2)} between languages)" if each else ""
        sentence += f"; half of them fire on no more than **{plain(median, 2)}** effective languages{spread}"
    return status, f"{sentence}."


def _effect(metrics: Metrics, languages: Sequence[str]) -> tuple[str, str] | None:
    ablate = metrics.get("ablate", {})
    own = _by_language(ablate, "dnll_own", languages)
    if ablate.get("own") is None or ablate.get("rows") is None:
        return None
    interval = f" (95 % interval over languages {_ends(mean_interval(list(own.values())))})" if len(own) > 1 else ""
    others = significant(ablate.get("others_abs"), digits=2)
    n = len(languages)
    return _status(min(ablate["rows"], ablate.get("rows_above_zero", n)) / n), (
        f"Without its features a language loses **{significant(ablate['own'])}** nats/token on average{interval}, the "
        f"others change by **{others}** in absolute size; the language itself loses most in "
        f"**{plain(ablate['rows'])} of {n}** cases."
    )


def _control(metrics: Metrics, languages: Sequence[str]) -> tuple[str, str] | None:
    ablate, n = metrics.get("ablate", {}), len(languages)
    above, holm = ablate.get("languages_above_control"), ablate.get("languages_above_control_holm")
    if above is None:
        return None
    counted = above if holm is None else holm
    kind = "" if holm is None else " after Holm’s correction"
    plainly = "" if holm is None else f"; without it {plain(above)}"
    return _status(counted / n), (
        f"In **{plain(counted)} of {n}** languages{kind} (95 % interval of the share {_shares(wilson(counted / n, n))}"
        f"{plainly}) their removal costs more than that of random latents which fire as often."
    )


def _identification(metrics: Metrics, languages: Sequence[str]) -> tuple[str, str] | None:
    identify = metrics.get("identify", {})
    share, texts = identify.get("accuracy/sae-count/units"), identify.get("texts")
    if share is None or not texts:
        return None
    rival = identify.get("accuracy/fasttext/none")
    low, high = wilson(share, texts)
    beside = "" if rival is None else f"; fastText is right for **{percent(rival)}**"
    status = HOLDS if high >= (rival or MOST) else IN_PART if share >= SOME else FAILS
    return status, (
        f"Which features fire tells the language of **{percent(share)}** of {plain(texts)} held-out texts (95 % "
        f"interval {_shares((low, high), 1)}){beside}."
    )


def _stability(metrics: Metrics, languages: Sequence[str]) -> tuple[str, str] | None:
    stability, n = metrics.get("stability", {}), len(languages)
    share, count = stability.get("features_matched_share"), stability.get("stability_features")
    if share is None or not count:
        return None
    overlap = _by_language(stability, "subspace_overlap", languages)
    random = _by_language(stability, "subspace_overlap_random_high", languages)
    above = sum(value > random.get(language, math.inf) for language, value in overlap.items())
    sets = _status(above / n)
    status = _status(share) if share >= SOME else IN_PART if sets == HOLDS else FAILS
    singly = (
        f"**{percent(share)}** of {plain(count)} features (95 % interval {_shares(wilson(share, count))}) have "
        f"a one-to-one partner in an SAE from another seed"
    )
    together = (
        f"; as sets, the directions agree beyond random latents in **{above} of {n}** languages" if overlap else ""
    )
    return status, f"{singly}{together}."


def _by_language(metrics: Mapping[str, Any], key: str, languages: Sequence[str]) -> dict[str, float]:
    return {one: metrics[f"{key}/{one}"] for one in languages if metrics.get(f"{key}/{one}") is not None}


def _status(share: float) -> str:
    return HOLDS if share >= MOST else IN_PART if share >= SOME else FAILS


def _ends(interval: tuple[float, float]) -> str:
    return " to ".join(significant(end) for end in interval)


def _shares(interval: tuple[float, float], decimals: int = 0) -> str:
    return " to ".join(percent(end, decimals) for end in interval)
