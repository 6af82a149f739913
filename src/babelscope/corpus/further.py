"""Texts that do not come from the corpus: of another domain for `identify`, or prompts for `steer`."""

from collections.abc import Sequence

import polars as pl

from babelscope.config.schema import Dataset
from babelscope.core.errors import UserError
from babelscope.corpus import hub, sampling, text_files


def read(source: str | Dataset, languages: Sequence[str], key: str) -> pl.DataFrame:
    """The texts of `languages` in a folder or data set, cleaned: `text_id`, `language`, `group`, `source`, `text`.

    `key` is the setting of params.yaml that an error names.

    Raises
    ------
    UserError: there is no such folder or data set, or it lacks a language.
    """
    if isinstance(source, Dataset):
        raw = hub.read([source], languages, key=key)[0]
    else:
        raw = text_files.read(source, languages, key)
    texts = sampling.clean(raw, min_characters=1)
    if missing := [name for name in languages if name not in set(texts["language"])]:
        raise UserError(f"params.yaml: {key}: no text in {', '.join(missing)}")
    return texts
