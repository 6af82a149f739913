"""`python tools/results.py`: write the figures of README.md and docs/results.md anew from metrics/ and params.yaml.

Each page has blocks between `<!-- NAME: ... -->` and `<!-- end -->`; only their content changes.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from babelscope.report import verdict
from babelscope.report.names import name
from babelscope.report.sections import baselines

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs/results.md"]
BLOCK = re.compile(r"(<!-- (\w+): [^\n]* -->\n).*?(<!-- end -->)", re.DOTALL)
STABLE = ["write_cosine", "subspace_overlap", "subspace_overlap_random_high"]
Metrics = dict[str, dict[str, Any]]


def page(text: str, metrics: Metrics, params: dict[str, Any]) -> str:
    """`text` with the content of its blocks made anew.

    `metrics` is metrics/<name>.json by name, `params` the content of params.yaml.
    """
    return BLOCK.sub(lambda found: f"{found[1]}{WRITERS[found[2]](metrics, params)}\n{found[3]}", text)


def _verdict(metrics: Metrics, params: dict[str, Any]) -> str:
    return verdict.text(metrics, params["languages"])


def _layers(metrics: Metrics, params: dict[str, Any]) -> str:
    ablate, score, quality = metrics["ablate"], metrics["score"], metrics["quality"]
    rows = [["layer", "FVU (held out)", "dead latents", "loss recovered", "features", "own ΔNLL, this layer alone",
             "others, mean"]]  # fmt: skip
    for hookpoint in params["hookpoints"]:
        train = metrics[f"train.{hookpoint}"]
        layer = str(train["layer"])
        shares = f"{100 * train['dead_share']:.1f} %", f"{100 * quality[f'loss_recovered/{hookpoint}']:.1f} %"
        alone = f"{ablate[f'own_alone/{hookpoint}']:+.3f}", f"{ablate[f'others_alone/{hookpoint}']:.4f}"
        rows.append([layer, f"{train['fvu']:.3f}", *shares, str(score[f"features_in_layer/{layer}"]), *alone])
    return _table(rows)


def _languages(metrics: Metrics, params: dict[str, Any]) -> str:
    ablate, score, stability = metrics["ablate"], metrics["score"], metrics["stability"]
    rows = [["language", "features", "effective languages (median)", "own ΔNLL", "control (upper end)", "write cosine",
             "subspace overlap (random, upper end)"]]  # fmt: skip
    for one in params["languages"]:
        control = f"{ablate[f'control/{one}']:+.2f} ({ablate[f'control_high/{one}']:+.2f})"
        median, cosine, overlap, random = (
            "-" if value is None else f"{value:.2f}"
            for value in (
                score.get(f"effective_languages_median/{one}"),
                *(stability.get(f"{key}/{one}") for key in STABLE),
            )
        )
        own = f"{ablate[f'dnll_own/{one}']:+.2f}"
        rows.append([name(one), str(score[f"features/{one}"]), median, own, control, cosine, f"{overlap} ({random})"])
    return _table(rows)


def _baselines(metrics: Metrics, params: dict[str, Any]) -> str:
    numbers = metrics.get("baselines", {})
    rows = [["method", "accuracy (95 %)", "points over the features (95 %)", "cosine when repeated"]]
    for key in numbers:
        method = key.removeprefix("accuracy/")
        if method == key or "/" in method:
            continue
        share, low, high = (f"{100 * numbers[f'accuracy{end}/{method}']:.1f}" for end in ("", "_low", "_high"))
        gap = "-"
        if f"difference/{method}" in numbers:
            points = [f"{100 * numbers[f'difference{end}/{method}']:+.1f}" for end in ("", "_low", "_high")]
            gap = f"{points[0]} ({points[1]} to {points[2]})"
        repeat = f"{numbers[f'repeat/{method}']:.3f}" if f"repeat/{method}" in numbers else "-"
        rows.append([baselines.NAMES.get(method, method), f"{share} % ({low} to {high})", gap, repeat])
    return _table(rows)


def _domains(metrics: Metrics, params: dict[str, Any]) -> str:
    numbers = metrics.get("baselines", {})
    rows = [["selected on", "tested on", "features", "selected there, too", "most frequent in the same language there",
             "accuracy", "fastText"]]  # fmt: skip
    for key in numbers:
        name, _, pair = key.partition("/")
        if name == "survive":
            one, _, other = pair.partition("/")
            shares = [numbers[f"{start}/{pair}"] for start in ("survive", "same_language")]
            shares += [numbers.get(f"accuracy/{method}/{pair}") for method in ("features", "fasttext")]
            shown = ["-" if share is None else f"{100 * share:.1f} %" for share in shares]
            rows.append([one, other, str(numbers[f"selected/{one}"]), *shown])
    return _table(rows)


def _script(metrics: Metrics, params: dict[str, Any]) -> str:
    numbers = metrics.get("script", {})
    rows = [["language", "letters replaced", "features that still fire, romanised", "shuffled"]]
    for one in params["languages"]:
        if f"still_shuffled/{one}" in numbers:
            keys = ("replaced", "still_romanised", "still_shuffled")
            shares = [numbers.get(f"{key}/{one}") for key in keys]
            rows.append([name(one), *("-" if share is None else f"{100 * share:.0f} %" for share in shares)])
    return _table(rows)


def _summary(metrics: Metrics, params: dict[str, Any]) -> str:
    return _table([["figure", "value"], *([f"`{key}`", f"{value:.5g}"] for key, value in metrics["summary"].items())])


def _table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


WRITERS: dict[str, Callable[[Metrics, dict[str, Any]], str]] = {
    "verdict": _verdict, "layers": _layers, "languages": _languages, "summary": _summary,
    "baselines": _baselines, "domains": _domains, "script": _script,
}  # fmt: skip


def main() -> None:
    """Write the pages."""
    metrics = {path.name.removesuffix(".json"): json.loads(path.read_text()) for path in ROOT.glob("metrics/*.json")}
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for path in PAGES:
        path.write_text(page(path.read_text(encoding="utf-8"), metrics, params), encoding="utf-8")


if __name__ == "__main__":
    main()
