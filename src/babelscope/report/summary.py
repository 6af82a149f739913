"""The headline figures of a state of the pipeline, by which DVC compares experiments: `metrics/summary.json`."""

from babelscope.report.numbers import known, mean
from babelscope.report.parts import ReportInputs

# The name of a figure, its stage, and its key in `metrics/<stage>.json`.
_SINGLE = (
    ("features", "score", "features"),
    ("effective_languages", "score", "effective_languages"),
    ("dnll_own", "ablate", "own"),
    ("dnll_others", "ablate", "others_abs"),
    ("dnll_control", "ablate", "control"),
    ("above_control", "ablate", "languages_above_control_holm"),
    ("selective", "ablate", "languages_selective_holm"),
    ("identified", "identify", "accuracy/sae-count/units"),
    ("fasttext", "identify", "accuracy/fasttext/none"),
    ("steered", "steer", "best_harmonic"),
    ("matched", "stability", "features_matched_share"),
)
# Means over the hookpoints: the name of a figure, and its stage and key.
_MEANS = (
    ("fvu", "train.{hookpoint}", "fvu"),
    ("dead_share", "train.{hookpoint}", "dead_share"),
    ("loss_recovered", "quality", "loss_recovered/{hookpoint}"),
)


def headline(inputs: ReportInputs) -> dict[str, float]:
    """At most 15 figures by name, as docs/contracts.md describes them; those that are not known are left out."""
    found = {name: inputs.figure(stage, key) for name, stage, key in _SINGLE}
    if (without := inputs.figure("score", "languages_without_features")) is not None:
        found["covered"] = len(inputs.languages) - without
    for name, stage, key in _MEANS:
        at = [(stage.format(hookpoint=each), key.format(hookpoint=each)) for each in inputs.hookpoints]
        found[name] = mean(inputs.figure(*place) for place in at)
    return {name: value for name, value in found.items() if known(value)}
