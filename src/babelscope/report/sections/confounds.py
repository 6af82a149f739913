"""Section `confounds`: what else could explain the results."""

from babelscope.report.parts import ReportInputs, Section, prose


def section(_: ReportInputs) -> Section:
    """Text alone."""
    text = prose(
        """<ul>
<li><strong>Training mix.</strong> How many features a language gets follows the mix that the SAEs were trained on. Read
the counts together with the corpus table above; a language that the SAE saw little of has few features, whatever the model knows.</li>
<li><strong>Script and tokeniser.</strong> They go with language: a latent that fires for one script fires “for” the only
language here that is written in it. Languages that share their script with another are the harder test.
NLL per token also depends on how finely the tokeniser cuts a language.</li>
<li><strong>Parallel texts.</strong> Translations of one text say the same thing. A parallel group is never in both splits, so the
evaluation holds no translation of a training text; content that occurs in one language only can still pass for language.</li>
</ul>"""
    )
    return Section("confounds", "Confounds", "What else could explain this", [text])
