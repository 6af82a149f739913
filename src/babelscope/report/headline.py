"""The top of the page: what was found, in a sentence and in the most important figures."""

from markupsafe import Markup

from babelscope.report.numbers import plain, significant
from babelscope.report.parts import ReportInputs, prose
from babelscope.report.sections import corpus, identification
from babelscope.report.sections.ablation import of_languages
from babelscope.report.sections.features import features, found, specific
from babelscope.report.sections.quality import mean_fvu


def title(inputs: ReportInputs) -> str:
    """The result in one sentence."""
    kind = "language-specific features" if inputs.members == 1 else f"features {specific(inputs)}"
    own, others = _effects(inputs)
    return (
        f"{plain(found(inputs))} {kind}: removing a language’s own changes its loss by {own} nats/token, "
        f"each other language’s by {others} in mean size"
    )


def claim(inputs: ReportInputs, model: str) -> Markup:
    """How the features were found and tested."""
    members = inputs.members
    return prose(
        """{count} sparse autoencoders, one per hookpoint, split the activations of {model} into latents.
SAE‑LAPE picks those whose firing rate is highest in {highest} {ratio} of that rate (<code>score.ratio</code>): they may fire in {other} languages, too, but less often.
They are then taken out, one language at a time, and the change of the negative log-likelihood (ΔNLL) of held-out text is measured in every language.""",
        count=len(inputs.hookpoints),
        model=model,
        highest="one language and, in every other, below"
        if members == 1
        else f"some language\nand, in exactly {members} languages, at least",
        ratio=inputs.params.get("score", {}).get("ratio"),
        other="other" if members == 1 else "further",
    )


def tiles(inputs: ReportInputs) -> list[tuple[Markup, str]]:
    """The most important figures: what each is, and the figure."""
    own, others = _effects(inputs)
    signed = significant(inputs.figure("ablate", "others"), sign=True, digits=2)
    kind = "language-specific features" if inputs.members == 1 else f"features {specific(inputs)}"
    result = [
        (prose("languages, {count} with features", count=features(inputs)["language"].n_unique()), str(len(inputs.languages))),
        (prose("hookpoints (layers read)"), str(len(inputs.hookpoints))),
        (prose("tokens read, in {texts} texts", texts=corpus.size(inputs, "texts")), corpus.size(inputs, "tokens")),
        (prose("{kind}", kind=kind), plain(found(inputs))),
        (prose("effective languages of a feature: e to the mean entropy of its firing rates"),
         plain(inputs.figure("score", "effective_languages"), 2)),
        (prose("mean FVU (variance left unexplained)"), plain(mean_fvu(inputs), 3)),
        (prose("own ΔNLL, nats/token"), own),
        (prose("others’ ΔNLL, nats/token: mean size (mean: {signed})", signed=signed), others),
        (prose("rows whose maximum is the diagonal; columns: {columns}", columns=of_languages(inputs, "columns")),
         of_languages(inputs, "rows")),
        (prose("rows whose own 95&nbsp;% interval lies above 0"), of_languages(inputs, "rows_above_zero")),
    ]  # fmt: skip
    if inputs.figure("ablate", "languages_above_control") is not None:
        selective = of_languages(inputs, "languages_selective")
        label = prose("languages that lose more than with random features; more selectively: {n}", n=selective)
        result.append((label, of_languages(inputs, "languages_above_control")))
    if not identification.confusion(inputs).is_empty():
        fasttext = identification.accuracy(inputs, "fasttext/none")
        label = prose("of held-out texts identified by features (fastText: {fasttext})", fasttext=fasttext)
        result.append((label, identification.accuracy(inputs)))
    return result


def _effects(inputs: ReportInputs) -> tuple[str, str]:
    """Own dNLL, and the mean size of the others'."""
    own, others = (inputs.figure("ablate", key) for key in ("own", "others_abs"))
    return significant(own, sign=True), significant(others, digits=2)
