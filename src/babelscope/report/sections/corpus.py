"""Section `corpus`: how much text there is of each language."""

from babelscope.report.numbers import percent, plain
from babelscope.report.parts import ReportInputs, Section, Table, figures, prose


def section(inputs: ReportInputs) -> Section:
    """Tokens and texts per language and split."""
    text = prose(
        """<p>The model read {tokens} tokens in {texts} texts. Features are counted and selected on the train split;
ablation is measured on the eval split. Translations of the same text are always in the same split. Padding made up
{padding} of the forward pass.</p>""",
        tokens=size(inputs, "tokens"),
        texts=size(inputs, "texts"),
        padding=percent(inputs.figure("extract", "padding_share")),
    )
    columns = {"language": inputs.languages}
    for key in ("train_tokens", "train_texts", "eval_tokens", "eval_texts"):
        columns[key.replace("_", " ")] = figures(inputs.each("sample", key))
    return Section("corpus", "Corpus", "The corpus", [text, Table.of("Tokens and texts by split", columns)])


def size(inputs: ReportInputs, key: str) -> str:
    """The number of "tokens" or "texts" that the model read."""
    return plain(inputs.figure("extract", key) or inputs.figure("sample", key))
