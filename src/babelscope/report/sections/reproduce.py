"""Section `reproduce`: the parameters, versions, input files and figures behind the page."""

from collections.abc import Iterable
from typing import Any

import yaml  # type: ignore[import-untyped]

from babelscope.report.numbers import plain, significant
from babelscope.report.parts import ReportInputs, Section, Table, prose


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
    versions = _table("Packages", ["package", "version"], inputs.versions.items())
    files = _table("Input files", ["file", "MD5"], inputs.files.items(), "Table: input files and their MD5")
    found = [(name, key, _text(value)) for name, content in inputs.metrics.items() for key, value in content.items()]
    caption, folded = "Every figure of every stage (metrics/*.json)", "Table: every figure of every stage"
    metrics = _table(caption, ["stage", "figure", "value"], found, folded)
    return Section("reproduce", "Reproduce", "Reproduce", [text, versions, files, metrics])


def _table(caption: str, head: list[str], rows: Iterable[tuple[str, ...]], folded: str = "") -> Table:
    return Table(caption, head, sorted(rows), labels=2, folded=folded)


def _text(value: Any) -> str:
    return significant(value, digits=6) if isinstance(value, float) else plain(value)
