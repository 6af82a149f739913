"""The five sentences of the verdict: their figures and intervals by hand, and what they say without figures."""

from typing import Any

import pytest

from babelscope.report import verdict
from babelscope.report.verdict import FAILS, HOLDS, IN_PART, UNKNOWN

LANGUAGES = ["en", "tr", "xx"]


def metrics(**changes: Any) -> dict[str, dict[str, Any]]:
    found = {
        "score": {"features": 60, "features/en": 10, "features/tr": 30, "features/xx": 20,
                  "effective_languages_median": 1.5, "effective_languages_median/en": 1.25,
                  "effective_languages_median/tr": 1.75},
        "ablate": {"own": 1.0, "others_abs": 0.01, "rows": 3, "rows_above_zero": 3, "languages_above_control": 3,
                   "languages_above_control_holm": 2, "dnll_own/en": 1.0, "dnll_own/tr": 1.0, "dnll_own/xx": 1.0},
        "identify": {"accuracy/sae-count/units": 0.9, "accuracy/fasttext/none": 0.95, "texts": 100},
        "stability": {"features_matched_share": 0.25, "stability_features": 40}
        | {f"subspace_overlap/{name}": 0.5 for name in LANGUAGES}
        | {f"subspace_overlap_random_high/{name}": 0.4 for name in LANGUAGES},
    }  # fmt: skip
    for stage, figures in changes.items():
        found[stage] |= figures
    return found


def by_claim(found: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    return [(one.status, one.text.replace("\u202f", "")) for one in verdict.sentences(found, LANGUAGES)]


def test_the_five_sentences() -> None:
    assert by_claim(metrics()) == [
        (HOLDS, "3 of 3 languages have features: 60 latents, from 10 (English) to 30 (Turkish) a language; half "
         "of them fire on no more than 1.50 effective languages (1.25 to 1.75 between languages)."),
        (HOLDS, "Without its features a language loses 1.00 nats/token on average (95 % interval over languages "
         "1.00 to 1.00), the others change by 0.010 in absolute size; the language itself loses most in 3 of 3 cases."),
        (IN_PART, "In 2 of 3 languages after Holm’s correction (95 % interval of the share 21% to 94%; without it "
         "3) their removal costs more than that of random latents which fire as often."),
        (IN_PART, "Which features fire tells the language of 90.0% of 100 held-out texts (95 % interval 82.6% "
         "to 94.5%); fastText is right for 95.0%."),
        (IN_PART, "25.0% of 40 features (95 % interval 14% to 40%) have a one-to-one partner in an SAE from "
         "another seed; as sets, the directions agree beyond random latents in 3 of 3 languages."),
    ]  # fmt: skip


def test_what_does_not_hold_is_said() -> None:
    nothing = metrics(
        score={"features/en": 0, "features/tr": 0},
        ablate={"rows": 1, "languages_above_control_holm": 1},
        stability={f"subspace_overlap/{name}": 0.1 for name in LANGUAGES},
        identify={"accuracy/sae-count/units": 0.3},
    )
    assert [status for status, _ in by_claim(nothing)] == [FAILS] * 5
    assert by_claim(metrics(score={"effective_languages_median": 2.5}))[0][0] == IN_PART
    assert by_claim(metrics(stability={"features_matched_share": 0.9}))[4][0] == HOLDS


def test_missing_metrics_are_not_measured() -> None:
    assert [status for status, _ in by_claim({})] == [UNKNOWN] * 5
    for stage, places in {"score": [0], "ablate": [1, 2], "identify": [3], "stability": [4]}.items():
        some = {name: figures for name, figures in metrics().items() if name != stage}
        statuses = [status for status, _ in by_claim(some)]
        assert [place for place, status in enumerate(statuses) if status == UNKNOWN] == places
    bare = {"ablate": {"own": 1.0, "others_abs": 0.1, "rows": 3}, "score": {"features": 1, "features/en": 1}}
    assert [status for status, _ in by_claim(bare)] == [FAILS, HOLDS, UNKNOWN, UNKNOWN, UNKNOWN]


def test_text_and_html_are_the_same_sentences() -> None:
    first = verdict.sentences(metrics(), LANGUAGES)[0]
    assert verdict.text(metrics(), LANGUAGES).splitlines()[0] == (
        f"- **Languages have features of their own** (holds). {first.markdown}"
    )
    assert first.html.startswith("<strong>3 of 3</strong> languages have features: <strong>60</strong> latents")
    assert verdict.Sentence("claim", HOLDS, "**<b>** & more").html == "<strong>&lt;b&gt;</strong> &amp; more"


def test_intervals() -> None:
    # Wilson's interval of 8 of 10, by the formula.
    assert verdict.wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert verdict.wilson(0, 5)[0] == 0.0 and verdict.wilson(1, 5)[1] == pytest.approx(1.0)
    low, high = verdict.mean_interval([0.0, 2.0] * 50)
    assert low == pytest.approx(1 - 1.96 * 0.1, abs=0.03) and high == pytest.approx(1 + 1.96 * 0.1, abs=0.03)
