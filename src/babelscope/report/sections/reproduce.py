"""Section `reproduce`: the parameters, versions, input files and figures behind the page."""

from collections.abc import Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]

from babelscope.report.blocks import Section, Table, prose
from babelscope.report.inputs import ReportInputs
from babelscope.report.numbers import plain, significant


def section(inputs: ReportInputs) -> Section:
    """Commands, parameters, versions, input files, and every figure."""
    text = prose(
        """<pre tabindex="0" aria-label="Commands">make repro         # run what is out of date, then write this page again
dvc params diff    # what was changed
dvc metrics diff   # what the change did
make ui            # the runs, in MLflow</pre>
<p>The same parameters, inputs and versions give this file, byte for byte.</p>
<h3 id="params-title">Parameters</h3>
<pre id="params" class="columns" tabindex="0" aria-labelledby="params-title">{params}</pre>""",
        params=yaml.safe_dump(dict(inputs.params), sort_keys=False, allow_unicode=True, width=1000),
    )
    versions = _pairs("Packages", ["package", "version"], inputs.versions)
    files = _pairs("Input files", ["file", "MD5"], inputs.files, "Table: input files and their MD5")
    return Section("reproduce", "Reproduce", "Reproduce", [text, versions, files, metrics_table(inputs)])


def _pairs(caption: str, head: list[str], content: Mapping[str, str], folded: str = "") -> Table:
    return Table(caption, head, [[key, value] for key, value in sorted(content.items())], labels=2, folded=folded)


def metrics_table(inputs: ReportInputs) -> Table:
    """Every figure of every metrics file."""

    def text(value: Any) -> str:
        return significant(value, digits=6) if isinstance(value, float) else plain(value)

    rows = [
        [name, key, text(value)]
        for name, content in sorted(inputs.metrics.items())
        for key, value in sorted(content.items())
    ]
    caption, folded = "Every figure of every stage (metrics/*.json)", "Table: every figure of every stage"
    return Table(caption, ["stage", "figure", "value"], rows, labels=2, folded=folded)
