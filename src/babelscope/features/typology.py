"""How far apart languages are in their grammar and sounds, by the URIEL database (Littell et al. 2017).

The data come with the package lang2vec, which is optional (`pip install --no-deps lang2vec`): only its file of features
is read, and none of its code runs.
"""

from collections.abc import Sequence
from pathlib import Path

import langcodes
import numpy as np
from numpy.typing import NDArray

from babelscope.models.packaged import files_of

# Syntax, phonology and phoneme inventory, each missing value predicted from the nearest languages.
_FILE = "/lang2vec/data/feature_predictions.npz"
# Languages that URIEL has, instead of the macrolanguages that their tags stand for.
_MEMBERS = {
    "zho": "cmn", "ara": "arb", "msa": "zsm", "fas": "pes", "est": "ekk", "lav": "lvs", "nor": "nob", "swa": "swh",
    "aze": "azj", "uzb": "uzn", "mon": "khk", "sqi": "als", "nep": "npi", "ori": "ory", "srp": "srp", "mlg": "plt",
}  # fmt: skip


def distances(languages: Sequence[str], path: Path | None = None) -> NDArray[np.float64] | None:
    """1 - cosine of the feature vectors of every two languages.

    Parameters
    ----------
    languages: BCP-47 tags.
    path: the file of features; None: that of lang2vec.

    Returns
    -------
    `[languages, languages]`, nan for a language that the database lacks; None if lang2vec is not installed.
    """
    path = path or next((file for file in files_of("lang2vec") or [] if file.as_posix().endswith(_FILE)), None)
    if path is None:
        return None
    with np.load(path, allow_pickle=False) as content:
        names, data = list(content["langs"]), content["data"]
        rows = {name: number for number, name in enumerate(names)}
        vectors = np.full((len(languages), data.shape[1]), np.nan)
        for number, language in enumerate(languages):
            code = langcodes.Language.get(language).to_alpha3()
            row = rows.get(code, rows.get(_MEMBERS.get(code, "")))
            if row is not None:
                vectors[number] = data[row, :, 0]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found: NDArray[np.float64] = 1 - unit @ unit.T
    return found
