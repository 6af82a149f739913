"""Section `corpus`: how much text there is of each language."""

from babelscope.report.numbers import percent, plain
from babelscope.report.parts import ReportInputs, Section, Table, figures, prose


def section(inputs: ReportInputs) -> Section:
    """Tokens and texts per language and split."""
    text = prose(
        """<p>{tokens} tokens in {texts} texts were read; features are counted and scored on the train split, ablation is
measured on the eval split. Parallel texts share a split. Padding in the forward pass: {padding}.</p>""",
        tokens=size(inputs, "tokens"),
        texts=size(inputs, "texts"),
        padding=percent(inputs.figure("extract", "padding_share")),
    )
    columns = {"language": inputs.languages}
    for key in ("train_tokens", "train_texts", "eval_tokens", "eval_texts"):
        columns[key.replace("_", " ")] = figures(inputs.figure("sample", f"{key}/{name}") for name in inputs.languages)
    return Section("corpus", "Corpus", "The corpus", [text, Table.of("Corpus", columns)])


def size(inputs: ReportInputs, of: str) -> str:
    """The number of "tokens" or "texts" that were read."""
    return plain(inputs.figure("extract", of) or inputs.figure("sample", of))
