"""`metrics/summary.json` by hand."""

from types import SimpleNamespace
from typing import Any

import pytest

from babelscope.report.summary import headline


def inputs(metrics: dict[str, dict[str, Any]]) -> Any:
    return SimpleNamespace(
        languages=["en", "fi", "tr"], hookpoints=["layers.1", "layers.2"],
        figure=lambda name, key: metrics.get(name, {}).get(key),
    )  # fmt: skip


def test_every_figure_and_means_over_the_hookpoints() -> None:
    ablate = {"own": 1.5, "others_abs": 0.01, "control": 0.2}
    ablate |= {"languages_above_control_holm": 2, "languages_selective_holm": 3}
    metrics = {
        "score": {"features": 7, "effective_languages": 1.25, "languages_without_features": 1}, "ablate": ablate,
        "identify": {"accuracy/sae-count/units": 0.75, "accuracy/fasttext/none": 0.5},
        "steer": {"best_harmonic": 0.125},
        "stability": {"features_matched_share": 0.1}, "train.layers.1": {"fvu": 0.25, "dead_share": 0.0},
        "train.layers.2": {"fvu": 0.5, "dead_share": 0.5},
        "quality": {"loss_recovered/layers.1": 0.5, "loss_recovered/layers.2": 1.0},
    }  # fmt: skip
    assert headline(inputs(metrics)) == {
        "features": 7, "effective_languages": 1.25, "covered": 2, "dnll_own": 1.5, "dnll_others": 0.01,
        "dnll_control": 0.2, "above_control": 2, "selective": 3, "identified": 0.75, "fasttext": 0.5, "steered": 0.125,
        "matched": 0.1, "fvu": 0.375, "dead_share": 0.25, "loss_recovered": 0.75,
    }  # fmt: skip


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_figure_that_is_not_known_has_no_key(value: float | None) -> None:
    assert headline(inputs({"ablate": {"own": value}, "train.layers.1": {"fvu": 0.5}})) == {"fvu": 0.5}
