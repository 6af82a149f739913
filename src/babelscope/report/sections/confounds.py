"""Section `confounds`: what else could explain the results."""

from babelscope.report.parts import ReportInputs, Section, prose


def section(_: ReportInputs) -> Section:
    """Text alone."""
    text = prose(
        """<ul>
<li><strong>Training data.</strong> How many features a language has depends on how much of its text the SAEs were
trained on. Compare the counts with the corpus table above: a language with little text has few features, even if the
model knows it well.</li>
<li><strong>Script and tokenizer.</strong> A latent that fires on a script looks specific to a language if no other
language here is written in that script. Languages that share their script with another one are the harder test. The NLL
per token also depends on how finely the tokenizer splits a language, so compare languages by it with care.</li>
<li><strong>Parallel texts.</strong> Translations of one text have the same content. They are always in the same split,
so no evaluation text is a translation of a training text. Still, content that occurs in one language only can look like
that language.</li>
</ul>"""
    )
    return Section("confounds", "Limits", "What else could explain these results", [text])
