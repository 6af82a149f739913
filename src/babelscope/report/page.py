"""The page: its sections in order, as one HTML file that needs nothing else."""

from importlib import import_module

from babelscope.config.values import local_name
from babelscope.report import charts, headline
from babelscope.report.assets import asset, environment, source_hash
from babelscope.report.parts import Picture, ReportInputs

# Each is a module of `babelscope.report.sections` with a function `section(inputs)`, which returns a Section or None.
NAMES = (
    "features", "ablation", "own", "control", "layers", "similarity", "identification", "baselines", "script",
    "steering", "quality", "corpus", "confounds", "reproduce",
)  # fmt: skip
SECTIONS = [import_module(f"babelscope.report.sections.{name}") for name in NAMES]


def build(inputs: ReportInputs) -> str:
    """The report as one HTML page: the same inputs give the same text.

    Scripts, styles, charts and data are inside; nothing is fetched, and a Content-Security-Policy forbids it. Every
    text from the inputs is escaped.
    """
    sections = [section for module in SECTIONS if (section := module.section(inputs))]
    pictures = [block for section in sections for block in section.blocks if isinstance(block, Picture)]
    specs = {picture.name: picture.chart.to_dict() for picture in pictures}  # checked against Vega-Lite's schema
    scripts = [charts.javascript(), asset("page.js")]
    model = local_name(inputs.params.get("model", {}).get("name", "the model"))
    return (
        environment()
        .from_string(asset("page.html.j2"))
        .render(
            policy=" ".join(source_hash(script) for script in scripts),
            scripts=scripts,
            style=asset("page.css"),
            charts={"specs": specs, "themes": charts.THEMES},
            sections=sections,
            model=model,
            title=headline.title(inputs),
            claim=headline.claim(inputs, model),
            tiles=headline.tiles(inputs),
        )
    )


def for_dvc() -> str:
    """The page that `dvc plots` fills (`.dvc/config`); DVC's own fetches Vega from a network each time it is opened."""
    return asset("plots.html.j2").replace("JAVASCRIPT", charts.javascript())
