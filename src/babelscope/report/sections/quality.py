"""Section `quality`: how well the SAEs describe the activations."""

import polars as pl
from markupsafe import Markup

from babelscope.report import charts
from babelscope.report.blocks import Picture, Section, Table, by_hookpoint, prose
from babelscope.report.inputs import ReportInputs
from babelscope.report.numbers import NONE, percent, plain


def section(inputs: ReportInputs) -> Section:
    """FVU by language and layer, and the figures of every SAE."""
    title, frame = "How good the autoencoders are", fvu_by_language(inputs)
    fvu = """<p>FVU is the share of the activations’ variance that the SAE misses: 0 is perfect, 1 is no better than the mean."""
    terms = """Dead: latents that do not fire. Found again: features whose decoder direction a second SAE, trained from another seed, has as well; in brackets the same share of
latents that are not selected for any language (some are shared by several) and fire at least as often.
</p>"""
    if frame.is_empty():
        return Section(
            "quality", "SAE quality", title, [prose(f"{fvu} L0: latents\nactive per token. {terms}"), table(inputs)]
        )
    caption: list[Markup | Table] = [
        prose(
            f"""{fvu} A language
with a high FVU is described less well, so its features are found less reliably. The colours run from the least to the largest
figure shown.</p>"""
        ),
        table(inputs),
        prose(f"<p>L0: latents active per token. {terms}"),
    ]
    description = "Fraction of variance that the SAEs leave unexplained; the table holds the same figures."
    chart = charts.heat_map(frame, name="fvu", title="FVU", decimals=2, zero=False, description=description)
    head = ["language", *inputs.hookpoints]
    folded = "Table: FVU per language and layer"
    fvu_table = Table("FVU per language and hookpoint", head, by_hookpoint(frame, 3), folded=folded)
    return Section(
        "quality", "SAE quality", title, [Picture("fvu", "FVU per language and layer", chart, caption), fvu_table]
    )


def fvu_by_language(inputs: ReportInputs) -> pl.DataFrame:
    """Fraction of variance unexplained: `language`, `hookpoint`, `layer`, `value`; empty without such figures."""
    grid = inputs.grid()
    values = [inputs.figure(f"train.{h}", f"fvu/{lang}") for lang, h in grid.select("language", "hookpoint").rows()]
    if all(value is None for value in values):
        return pl.DataFrame()
    return grid.with_columns(pl.Series("value", values, dtype=pl.Float64))


def mean_fvu(inputs: ReportInputs) -> float | None:
    """The mean over the hookpoints of the SAEs' FVU, or None if none is known."""
    values = [inputs.figure(f"train.{name}", "fvu") for name in inputs.hookpoints]
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def table(inputs: ReportInputs) -> Table:
    """The SAEs: how well each reconstructs, how sparse it is, how many of its latents are dead."""
    rows = []
    for hookpoint in inputs.hookpoints:
        get = inputs.metrics.get(f"train.{hookpoint}", {}).get
        recovered = percent(inputs.figure("quality", f"loss_recovered/{hookpoint}"))
        share, others = (inputs.figure("stability", f"stability_share{end}/{hookpoint}") for end in ("", "_others"))
        again = NONE if share is None else f"{percent(share)} ({percent(others)})"
        sparsity = [plain(get("fvu"), 3), plain(get("l0"), 1), percent(get("dead_share"))]
        rows.append([hookpoint, *sparsity, recovered, again, plain(get("tokens"))])
    head = ["hookpoint", "FVU", "L0", "dead latents", "loss recovered", "features found again", "tokens trained on"]
    return Table("One SAE per hookpoint", head, rows)
