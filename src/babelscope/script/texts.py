"""The same texts in Latin letters, and with their words in random order."""

import re
import zlib

import numpy as np
from anyascii import anyascii

# Characters of scripts without spaces between words: Thai and Lao, kana, Han.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")


def romanise(text: str) -> str:
    """The text in ASCII letters, by anyascii (each character on its own, without knowledge of the language).

    Diacritics are dropped. Vowels that a script does not write are missing, and Han characters are read as Mandarin,
    in Japanese texts, too.
    """
    return str(anyascii(text))


def shuffle_words(text: str, text_id: str, seed: int) -> str:
    """The text with its words in random order; in scripts without spaces, each character counts as a word.

    The order depends on `seed` and `text_id` only.
    """
    words = _WORD.findall(text)
    order = np.random.default_rng([seed, zlib.crc32(text_id.encode())]).permutation(len(words))
    shuffled = " ".join(words[i] for i in order)
    return re.sub(f"(?<=[{_UNSPACED}]) (?=[{_UNSPACED}])", "", shuffled)


def replaced_share(text: str) -> float:
    """The share of the text's letters that `romanise` replaces, those that are not ASCII: 0..1, 0 without letters."""
    letters = [character for character in text if character.isalpha()]
    return sum(not letter.isascii() for letter in letters) / len(letters) if letters else 0.0
