"""Section `quality`: how well the SAEs describe the activations."""

import polars as pl
from markupsafe import Markup

from babelscope.report import charts
from babelscope.report.numbers import NONE, percent
from babelscope.report.parts import Picture, ReportInputs, Section, Table, figures, prose


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
    by_language = Table.grid("FVU per language and hookpoint", frame, 3, "Table: FVU per language and layer")
    return Section(
        "quality", "SAE quality", title, [Picture("fvu", "FVU per language and layer", chart, caption), by_language]
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
    names = inputs.hookpoints
    training = {
        key: [inputs.figure(f"train.{name}", key) for name in names] for key in ("fvu", "l0", "dead_share", "tokens")
    }
    again, others, recovered = (
        [inputs.figure(stage, f"{key}/{name}") for name in names]
        for stage, key in (
            ("stability", "stability_share"), ("stability", "stability_share_others"), ("quality", "loss_recovered")
        )
    )  # fmt: skip
    found = [
        NONE if share is None else f"{percent(share)} ({percent(other)})"
        for share, other in zip(again, others, strict=True)
    ]
    columns = {
        "hookpoint": names,
        "FVU": figures(training["fvu"], 3),
        "L0": figures(training["l0"], 1),
        "dead latents": map(percent, training["dead_share"]),
        "loss recovered": map(percent, recovered),
        "features found again": found,
        "tokens trained on": figures(training["tokens"]),
    }
    return Table.of("One SAE per hookpoint", columns)
