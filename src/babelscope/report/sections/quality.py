"""Section `quality`: how well the SAEs describe the activations."""

from typing import Any

import polars as pl

from babelscope.report import charts
from babelscope.report.numbers import NONE, mean, percent
from babelscope.report.parts import Block, Picture, ReportInputs, Section, Table, figures, how_to_read, prose


def section(inputs: ReportInputs) -> Section:
    """FVU by language and layer, and the figures of every SAE."""
    caption = how_to_read(
        """<p>FVU is the fraction of the activations’ variance that the SAE leaves unexplained: 0 is perfect, 1 is no
better than the mean. The activations of a language with a high FVU are described less well, so its features are found
less reliably.</p>"""
    )
    terms = prose(
        """<p>L0 is the number of latents that are active per token; a dead latent never is. Recovered: how much of the
model’s loss returns with the SAE’s reconstruction (100&nbsp;%: as with the activations; 0: as with zeros), with its
95&nbsp;% interval over texts. Found again: the share of features that a second SAE, trained with another seed, has as
well, by the direction of the decoder; in brackets the same share of latents that fire at least as often but are not
selected for any single language. Matched: the stricter share of features whose partner in the second SAE, if each
latent has at most one, has a similar decoder and a similar encoder direction.</p>"""
    )
    frame = fvu_by_language(inputs)
    text: list[Block | Picture] = [caption, table(inputs), terms]
    if not frame.is_empty():
        description = "Fraction of variance that the SAEs leave unexplained; the table holds the same figures."
        chart = charts.heat_map(frame, name="fvu", title="FVU", decimals=2, zero=False, description=description)
        by_language = Table.grid("FVU per language and hookpoint", frame, 3, "FVU per language and layer")
        text = [Picture("fvu", "FVU per language and layer", chart, [terms, caption]), table(inputs), by_language]
    return Section("quality", "SAE quality", finding(inputs), text)


def finding(inputs: ReportInputs) -> str:
    """How much variance the SAEs leave unexplained."""
    fvu = mean_fvu(inputs)
    if fvu is None:
        return "How well the autoencoders describe the activations"
    recovered = inputs.each("quality", "loss_recovered", inputs.hookpoints)
    worst = min((value for value in recovered if value is not None), default=None)
    end = "" if worst is None else f" and recover at least {percent(worst, 0)} of the model’s loss"
    return f"The autoencoders leave {percent(fvu)} of the activations’ variance unexplained{end}"


def fvu_by_language(inputs: ReportInputs) -> pl.DataFrame:
    """Fraction of variance unexplained: `language`, `hookpoint`, `layer`, `value`; empty without such figures."""
    grid = inputs.grid()
    values = []
    for language, hookpoint in grid.select("language", "hookpoint").rows():
        value = inputs.figure(f"train.{hookpoint}", f"fvu/{language}")
        if value is None:  # the language trained no SAE
            value = inputs.figure("extend", f"added_fvu/{hookpoint}/{language}")
        values.append(value)
    if all(value is None for value in values):
        return pl.DataFrame()
    return grid.with_columns(pl.Series("value", values, dtype=pl.Float64))


def of_training(inputs: ReportInputs, key: str) -> list[Any]:
    """A figure of the training of each SAE."""
    return [inputs.figure(f"train.{name}", key) for name in inputs.hookpoints]


def mean_fvu(inputs: ReportInputs) -> float | None:
    """The mean over the hookpoints of the SAEs' FVU, or None if none is known."""
    return mean(of_training(inputs, "fvu"))


def table(inputs: ReportInputs) -> Table:
    """The SAEs: how well each reconstructs, how sparse it is, how many of its latents are dead."""

    def shares(stage: str, key: str) -> list[str]:
        return [percent(value) for value in inputs.each(stage, key, inputs.hookpoints)]

    again = zip(shares("stability", "stability_share"), shares("stability", "stability_share_others"), strict=True)
    ends = zip(*(shares("quality", f"loss_recovered_{end}") for end in ("low", "high")), strict=True)
    columns = {
        "hookpoint": inputs.hookpoints, "FVU": figures(of_training(inputs, "fvu"), 3),
        "L0": figures(of_training(inputs, "l0"), 1), "dead": map(percent, of_training(inputs, "dead_share")),
        "recovered": shares("quality", "loss_recovered"),
        "95 %": [NONE if low == NONE else f"{low} to {high}" for low, high in ends],
        "found again": [NONE if own == NONE else f"{own} ({others})" for own, others in again],
        "matched": shares("stability", "features_matched_share"),
    }  # fmt: skip
    return Table.of("One SAE per hookpoint", columns)
