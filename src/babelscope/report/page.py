"""The page: its sections in order, as one HTML file that needs nothing else."""

from importlib import import_module

from babelscope.config.values import model_title
from babelscope.report import charts, headline, verdict
from babelscope.report.assets import asset, rendered, source_hash
from babelscope.report.parts import Picture, ReportInputs

# The argument of the page, part by part. Each name is a module of `babelscope.report.sections` with a function
# `section(inputs)`, which returns a Section or None; a part without a section is left out.
PARTS = {
    "The question: which features belong to a language?": ("features", "layers"),
    "The evidence: what they do": (
        "ablation", "own", "control", "curve", "identification", "baselines", "steering", "switching",
    ),
    "The doubt: what else could explain it?": (
        "script", "stability", "similarity", "sharing", "quality", "corpus", "confounds",
    ),
    "For reference": ("reproduce",),
}  # fmt: skip
NAMES = tuple(name for names in PARTS.values() for name in names)
SECTIONS = [import_module(f"babelscope.report.sections.{name}") for name in NAMES]


def build(inputs: ReportInputs) -> str:
    """The report as one HTML page: the same inputs give the same text.

    Scripts, styles, charts and data are inside; nothing is fetched, and a Content-Security-Policy forbids it. Every
    text from the inputs is escaped.
    """
    made = {name: module.section(inputs) for name, module in zip(NAMES, SECTIONS, strict=True)}
    parts = {title: [section for name in names if (section := made[name])] for title, names in PARTS.items()}
    blocks = [block for section in made.values() if section for block in section.blocks]
    pictures = [block for block in blocks if isinstance(block, Picture)]
    specs = {picture.name: picture.chart.to_dict() for picture in pictures}  # checked against Vega-Lite's schema
    scripts = [charts.javascript(), asset("page.js")]
    model = model_title(inputs.params.get("model", {})) or "the model"
    return rendered(
        asset("page.html.j2"),
        policy=" ".join(source_hash(script) for script in scripts), scripts=scripts, style=asset("page.css"),
        charts={"specs": specs, "themes": charts.THEMES, "print": charts.PRINT},
        parts={title: sections for title, sections in parts.items() if sections}, model=model,
        title=headline.title(inputs), sentences=verdict.sentences(inputs.metrics, inputs.languages),
        claim=headline.claim(inputs, model), tiles=headline.tiles(inputs),
    )  # fmt: skip


def for_dvc() -> str:
    """The page that `dvc plots` fills: `.dvc/plots/page.html`. DVC's own fetches Vega whenever it is opened."""
    return asset("plots.html.j2").replace("JAVASCRIPT", charts.javascript())
