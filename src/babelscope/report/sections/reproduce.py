"""Section `reproduce`: the parameters, versions, input files and figures behind the page."""

from typing import Any

import yaml  # type: ignore[import-untyped]

from babelscope.report.numbers import plain, significant
from babelscope.report.parts import ReportInputs, Section, Table, prose


def section(inputs: ReportInputs) -> Section:
    """Commands, parameters, versions, input files, and every figure."""
    text = prose(
        """<pre tabindex="0" aria-label="Commands">
make repro         # run the stages that are out of date, and write this page again
dvc params diff    # which parameters changed since the last commit
dvc metrics diff   # which figures changed since the last commit
make ui            # show the runs in MLflow</pre>
<p>The same parameters, input files and package versions give exactly this file.</p>
<h4 id="params-title">Parameters</h4>
<pre id="params" class="columns" tabindex="0" aria-labelledby="params-title">{params}</pre>""",
        params=yaml.safe_dump(dict(inputs.params), sort_keys=False, allow_unicode=True, width=1000),
    )
    found = [(name, key, _text(value)) for name, content in inputs.metrics.items() for key, value in content.items()]
    versions = Table("Packages", ["package", "version"], sorted(inputs.versions.items()), 2)
    files = Table("Input files", ["file", "MD5"], sorted(inputs.files.items()), 2, "input files and their MD5")
    folded = "every figure of every stage"
    metrics = Table("Every figure (metrics/*.json)", ["stage", "figure", "value"], sorted(found), 2, folded)
    return Section("reproduce", "Reproduce", "How to reproduce this page", [text, versions, files, metrics])


def _text(value: Any) -> str:
    return significant(value, digits=6) if isinstance(value, float) else plain(value)
