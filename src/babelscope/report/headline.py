"""The top of the page: what was found, in a sentence and in the most important figures."""

from markupsafe import Markup

from babelscope.report.numbers import plain, significant
from babelscope.report.parts import ReportInputs, prose
from babelscope.report.sections import corpus, identification
from babelscope.report.sections.ablation import of_languages
from babelscope.report.sections.features import features, found, kind
from babelscope.report.sections.quality import mean_fvu


def title(inputs: ReportInputs) -> str:
    """The result in one sentence."""
    own, others = _effects(inputs)
    return (
        f"{plain(found(inputs))} {kind(inputs)}: removing those of one language changes its own loss by {own} nats per "
        f"token, and that of other languages by {others}"
    )


def claim(inputs: ReportInputs, model: str) -> Markup:
    """How the features were found and tested."""
    rule = """a latent as a feature of a language if it fires at its highest rate on that language and at less than
{ratio} times that rate (<code>score.ratio</code>) on every other one"""
    if inputs.members > 1:
        rule = f"""a latent if exactly {inputs.members} languages reach {{ratio}} times its highest firing rate
(<code>score.ratio</code>), as a feature of each of them"""
    return prose(
        f"""A sparse autoencoder (SAE) splits the activations at one place in {{model}}, a hookpoint, into latents. The
method SAE‑LAPE selects {rule}. A feature may therefore fire on other languages, too, but less often. To test the
features, those of one language at a time are removed from the activations. ΔNLL is the change that this makes in the
model’s loss (its negative log-likelihood) on held-out text of each language.""",
        model=model,
        ratio=inputs.params.get("score", {}).get("ratio"),
    )


def tiles(inputs: ReportInputs) -> list[tuple[str, str]]:
    """The most important figures: what each is, and the figure."""
    own, others = _effects(inputs)
    signed = significant(inputs.figure("ablate", "others"), sign=True, digits=2)
    of = {
        key: of_languages(inputs, key)
        for key in ("rows", "columns", "rows_above_zero", "languages_above_control", "languages_selective")
    }
    result = [
        (f"languages, {features(inputs)['language'].n_unique()} with features", str(len(inputs.languages))),
        ("hookpoints, with one SAE each", str(len(inputs.hookpoints))),
        (f"tokens in {corpus.size(inputs, 'texts')} texts", corpus.size(inputs, "tokens")),
        (kind(inputs), plain(found(inputs))),
        ("effective number of languages on which a feature fires (exp of the mean entropy of its firing rates)",
         plain(inputs.figure("score", "effective_languages"), 2)),
        ("mean FVU (fraction of variance unexplained)", plain(mean_fvu(inputs), 3)),
        ("ΔNLL of the language itself, nats/token", own),
        (f"mean absolute ΔNLL of other languages, nats/token; with its sign: {signed}", others),
        (f"languages whose features affect no other language more; languages that no other language’s features affect "
         f"more: {of['columns']}", of["rows"]),
        ("languages whose own ΔNLL has a 95\u00a0% interval above 0", of["rows_above_zero"]),
    ]  # fmt: skip
    if inputs.figure("ablate", "languages_above_control") is not None:
        label = f"languages that lose more than with random latents; more selectively: {of['languages_selective']}"
        result.append((label, of["languages_above_control"]))
    if not identification.confusion(inputs).is_empty():
        fasttext = identification.accuracy(inputs, "fasttext/none")
        label = f"held-out texts whose language the features identify (fastText: {fasttext})"
        result.append((label, identification.accuracy(inputs)))
    if inputs.figure("script", "tested"):
        free = inputs.figure("script", "tested") - inputs.figure("script", "script_bound")
        label = f"of {inputs.figure('script', 'tested')} features of other scripts still fire in Latin letters"
        result.append((label, plain(free)))
    return result


def _effects(inputs: ReportInputs) -> tuple[str, str]:
    """Own dNLL, and the mean absolute value of the others'."""
    own, others = (inputs.figure("ablate", key) for key in ("own", "others_abs"))
    return significant(own, sign=True), significant(others, digits=2)
