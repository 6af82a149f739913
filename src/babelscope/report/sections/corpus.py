"""Section `corpus`: how much text there is of each language."""

from babelscope.report.blocks import Section, Table, prose
from babelscope.report.inputs import ReportInputs
from babelscope.report.numbers import percent, plain


def section(inputs: ReportInputs) -> Section:
    """Tokens and texts per language and split."""
    text = prose(
        """<p>{tokens} tokens in {texts} texts were read; features are counted and scored on the train split, ablation is
measured on the eval split. Parallel texts share a split. Padding in the forward pass: {padding}.</p>""",
        tokens=size(inputs, "tokens"),
        texts=size(inputs, "texts"),
        padding=percent(inputs.figure("extract", "padding_share")),
    )
    keys = ("train_tokens", "train_texts", "eval_tokens", "eval_texts")
    rows = [[lang, *(plain(inputs.figure("sample", f"{key}/{lang}")) for key in keys)] for lang in inputs.languages]
    table = Table("Corpus", ["language", "train tokens", "train texts", "eval tokens", "eval texts"], rows)
    return Section("corpus", "Corpus", "The corpus", [text, table])


def size(inputs: ReportInputs, of: str) -> str:
    """The number of "tokens" or "texts" that were read."""
    return plain(inputs.figure("extract", of) or inputs.figure("sample", of))
