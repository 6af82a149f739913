"""The page: its sections in order, as one HTML file that needs nothing else."""

from typing import Any

from babelscope.config.values import local_name
from babelscope.report import charts, headline
from babelscope.report.assets import asset, environment, source_hash
from babelscope.report.parts import Picture, ReportInputs, Section
from babelscope.report.sections import (
    ablation,
    confounds,
    corpus,
    features,
    identification,
    layers,
    own,
    quality,
    reproduce,
    similarity,
    steering,
)

SECTIONS = [
    features,
    ablation,
    own,
    layers,
    similarity,
    identification,
    steering,
    quality,
    corpus,
    confounds,
    reproduce,
]


def build(inputs: ReportInputs) -> str:
    """The report as one HTML page: the same inputs give the same text.

    Scripts, styles, charts and data are inside; nothing is fetched, and a Content-Security-Policy forbids it. Every
    text from the inputs is escaped.
    """
    sections = [module.section(inputs) for module in SECTIONS]
    scripts = [charts.javascript(), asset("page.js")]
    model = local_name(inputs.params.get("model", {}).get("name", "the model"))
    return environment().from_string(asset("page.html.j2")).render(
        policy=" ".join(source_hash(script) for script in scripts),
        scripts=scripts,
        style=asset("page.css"),
        charts={"specs": _specs(sections), "themes": charts.THEMES},
        sections=sections,
        model=model,
        title=headline.title(inputs),
        claim=headline.claim(inputs, model),
        tiles=headline.tiles(inputs),
    )  # fmt: skip


def _specs(sections: list[Section | None]) -> dict[str, Any]:
    """The charts as Vega-Lite specifications, checked against its schema, by name."""
    blocks = [block for section in sections if section for block in section.blocks]
    return {block.name: block.chart.to_dict() for block in blocks if isinstance(block, Picture)}


def for_dvc() -> str:
    """The page that `dvc plots` fills (`.dvc/config`); DVC's own fetches Vega from a network each time it is opened."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Babelscope: dvc plots</title>
{{refresh_tag}}
<script>(() => {{{charts.javascript()}}})();</script>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 1.5rem; }}
body > div {{ margin-bottom: 2rem; overflow-x: auto; }}
</style>
</head>
<body>
{{plot_divs}}
</body>
</html>
"""
