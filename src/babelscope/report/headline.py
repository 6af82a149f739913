"""The top of the page: what was found, in a sentence and in the most important figures; the verdict is between them."""

from markupsafe import Markup

from babelscope.report.numbers import plain, significant
from babelscope.report.parts import ReportInputs, prose
from babelscope.report.sections import corpus
from babelscope.report.sections.features import features, found, kind
from babelscope.report.sections.quality import mean_fvu


def title(inputs: ReportInputs) -> str:
    """The result in one sentence."""
    own, others = _effects(inputs)
    return (
        f"{plain(found(inputs))} {kind(inputs)}: without its own, a language’s loss changes by {own} nats/token, "
        f"and that of other languages by {others}"
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
    tested, bound = (inputs.figure("script", key) for key in ("tested", "script_bound"))
    label = f"of {plain(tested)} features of other scripts still fire on romanised texts"
    return [
        (f"languages, {features(inputs)['language'].n_unique()} with features", str(len(inputs.languages))),
        ("hookpoints, with one SAE each", str(len(inputs.hookpoints))),
        (f"tokens in {corpus.size(inputs, 'texts')} texts", corpus.size(inputs, "tokens")),
        ("effective number of languages on which a feature fires (exp of the mean entropy of its firing rates)",
         plain(inputs.figure("score", "effective_languages"), 2)),
        ("mean FVU (fraction of variance unexplained)", plain(mean_fvu(inputs), 3)),
        ("ΔNLL of the language itself, nats/token", own),
        (f"mean absolute ΔNLL of other languages, nats/token; with its sign: {signed}", others),
        ("ΔNLL of a language without random latents that fire as often, nats/token",
         significant(inputs.figure("ablate", "control"), sign=True)),
        *([(label, plain(tested - bound))] if tested else []),
    ]  # fmt: skip


def _effects(inputs: ReportInputs) -> tuple[str, str]:
    """Own dNLL, and the mean absolute value of the others'."""
    own, others = (inputs.figure("ablate", key) for key in ("own", "others_abs"))
    return significant(own, sign=True), significant(others, digits=2)
