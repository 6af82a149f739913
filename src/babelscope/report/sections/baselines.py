"""Section `baselines`: what training the dictionary buys over simpler methods."""

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.numbers import NONE, mean, percent, plain, significant
from babelscope.report.parts import Block, Picture, ReportInputs, Section, Table, how_to_read

ALL = "all"
NAMES = {
    "features": "SAE features", "frozen_decoder": "SAE with a frozen decoder",
    "frozen_encoder": "SAE with a frozen encoder", "random_model": "SAE of a random model", "neurons": "neurons (LAPE)",
    "diff_mean": "difference of means", "component": "one principal component", "probe": "linear probe",
    "fasttext": "fastText",
}  # fmt: skip


def section(inputs: ReportInputs) -> Section | None:
    """The comparison; None if the stage compared nothing."""
    frame = inputs.baselines
    if frame is None or frame.is_empty():
        return None
    reading = how_to_read(
        """<p>All methods read the activations at {hookpoint}, except for fastText, which reads the text, and neurons,
which are those of the same block. They identify the language of the same held-out texts. A difference of means, a
principal component and a linear probe need no dictionary; an SAE whose decoder or encoder stays as it was initialised
shows what training these weights adds. Lines are 95&nbsp;% intervals over the texts. If the interval of the difference
to the SAE features includes 0, the texts do not show that the features are better or worse. The features of all
hookpoints together are in the section on identification.</p>""",
        hookpoint=next(iter(inputs.params.get("stability", {}).get("hookpoints", [])), None),
    )
    rows = everywhere(frame)
    picture = Picture("baselines", "Held-out texts whose language is identified", chart(rows), [reading])
    tables: list[Block | Picture] = [picture, table(inputs, rows)]
    tables += [domains_table(frame), transfer_table(inputs)] if frame["trained_on"].n_unique() > 1 else []
    return Section("baselines", "Simpler methods", finding(rows), tables)


def finding(rows: pl.DataFrame) -> str:
    """How many of the other methods are shown to be better than the features, and to be worse."""
    others = rows.filter(pl.col("method") != "features")
    worse, better = (
        int(condition.sum()) for condition in (others["difference_high"] < 0, others["difference_low"] > 0)
    )
    return (
        f"What training the dictionary buys: of {len(others)} other methods, {worse} identify languages worse than the "
        f"features of the same hookpoint, {better} better"
    )


def everywhere(frame: pl.DataFrame) -> pl.DataFrame:
    """All languages, trained and evaluated on all domains, with `name`, in the order of `NAMES`."""
    rows = frame.filter(pl.col("languages") == ALL, pl.col("trained_on") == ALL, pl.col("evaluated_on") == ALL)
    rows = rows.with_columns(name=pl.col("method").replace(NAMES))
    return rows.sort(pl.col("method").replace_strict({key: i for i, key in enumerate(NAMES)}, default=len(NAMES)))


def chart(rows: pl.DataFrame) -> alt.LayerChart:
    """Points with intervals."""
    base = alt.Chart(charts.data(rows)).encode(
        y=alt.Y("name:N", sort=rows["name"].to_list(), title=None),
        tooltip=charts.tips("name:N", "texts:Q", ("accuracy:Q", "accuracy", ".1%"), *charts.ends(".1%")),
    )
    axis = alt.Axis(title="accuracy", format="%", grid=True, tickCount=5)
    # Of a domain without a width (all methods are right about all texts), Vega makes an axis of rounding errors.
    same = rows["low"].min() == rows["high"].max()
    scale = alt.Scale(domain=[0, 1]) if same else alt.Scale(zero=False)
    return alt.layer(
        base.mark_rule(strokeWidth=1.5).encode(x=alt.X("low:Q", axis=axis, scale=scale), x2="high:Q"),
        base.mark_point(style="own", filled=True, size=50, opacity=1).encode(x="accuracy:Q"),
        description="Accuracy of every method with its interval; the table below holds the same figures.",
    ).properties(width=480, height=alt.Step(28))


def table(inputs: ReportInputs, rows: pl.DataFrame) -> Table:
    """Every method: identification, removal, repetition."""
    assert inputs.baselines is not None
    pairs = inputs.baselines.filter(pl.col("languages") != ALL)["languages"].unique(maintain_order=True).to_list()
    again = mean(inputs.each("stability", "write_cosine"))  # of what features of another seed write
    lines = []
    for row in rows.iter_rows(named=True):
        method = row["method"]
        difference = NONE
        if row["difference"] is not None and method != "features":
            ends = [plain(100 * row[f"difference{end}"], 1, sign=True) for end in ("", "_low", "_high")]
            difference = f"{ends[0]} ({ends[1]} to {ends[2]})"
        alone = [inputs.figure("baselines", f"accuracy/{method}/{pair.replace('/', '-')}") for pair in pairs]
        effects = [NONE if inputs.figure("baselines", f"{key}/{method}") is None else " to ".join(
            significant(inputs.figure("baselines", f"{key}_{end}/{method}"), sign=True) for end in ("low", "high"))
            for key in ("own", "others")]  # fmt: skip
        repeat = again if method == "features" else inputs.figure("baselines", f"repeat/{method}")
        lines.append([
            row["name"], percent(row["accuracy"]), f"{percent(row['low'])} to {percent(row['high'])}", difference,
            *map(percent, alone), *effects, plain(repeat, 3),
            percent(inputs.figure("baselines", f"agreement/{method}")),
            percent(inputs.figure("stability", "features_matched_share") if method == "features" else
                    inputs.figure("baselines", f"matched/{method}")),
        ])  # fmt: skip
    head = [
        "method", "accuracy", "95 %", "points over the features (95 %)", *pairs, "ΔNLL of itself when removed (95 %)",
        "ΔNLL of others (95 %)", "cosine when repeated", "same answers when repeated", "units found again",
    ]  # fmt: skip
    return Table("Identification of all languages and of close pairs; removal; repetition", head, lines)


def domains_table(frame: pl.DataFrame) -> Table:
    """Accuracy by the domain of the training texts and of the held-out ones."""
    rows = frame.filter(pl.col("languages") == ALL, pl.col("evaluated_on") != ALL)
    settings = rows.select("trained_on", "evaluated_on").unique(maintain_order=True).rows()
    known = dict(zip(zip(rows["method"], rows["trained_on"], rows["evaluated_on"], strict=True), rows["accuracy"],
                     strict=True))  # fmt: skip
    lines = [
        [row["name"], *(percent(known.get((row["method"], *setting))) for setting in settings)]
        for row in everywhere(frame).iter_rows(named=True)
    ]
    head = ["method", *(f"{one}, tested on {other}" for one, other in settings)]
    return Table("Accuracy by the domain on which features are selected, and directions fitted", head, lines)


def transfer_table(inputs: ReportInputs) -> Table:
    """What becomes in one domain of the features selected on another."""
    lines = []
    for key in inputs.metrics.get("baselines", {}):
        if key.startswith("survive/"):
            pair = key.removeprefix("survive/")
            one, _, other = pair.partition("/")
            same = inputs.figure("baselines", f"same_language/{pair}")
            selected = plain(inputs.figure("baselines", f"selected/{one}"))
            lines.append([one, other, selected, percent(inputs.figure("baselines", key)), percent(same)])
    head = ["selected on", "looked at on", "features", "selected there, too"]
    head += ["most frequent in the same language there"]
    return Table("Features selected on one domain, on the texts of another", head, lines, labels=2)
