import logging
import random
import re

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from babelscope.config.schema import Corpus
from babelscope.core.errors import UserError
from babelscope.corpus import sampling


def section(**changes: object) -> Corpus:
    values = dict(source="files", packages=[], path="texts", domain=None, source_language="en", datasets=[],
                  lid=None, min_characters=1,
                  max_tokens=8, train_tokens=60, eval_tokens=20)  # fmt: skip
    return Corpus.model_validate(values | changes)


def words(texts: list[str]) -> list[list[int]]:
    """A token per word: its bytes as a number."""
    return [[int.from_bytes(word.encode(), "big") for word in text.split()] for text in texts]


def corpus(*rows: tuple[str, str | None, str]) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema={"language": pl.String, "group": pl.String, "text": pl.String}, orient="row")
    return frame.select("language", "group", pl.lit("files:test").alias("source"), "text")


def parallel(languages: list[str], groups: int, length: int = 5) -> pl.DataFrame:
    """Texts of `length` words, one in each language for each group."""
    return corpus(
        *((lang, f"g{i}", f"{lang}{i} " + "word " * (length - 1)) for lang in languages for i in range(groups))
    )


def test_cleaning_by_hand() -> None:
    frame = sampling.clean(
        corpus(
            ("de", "a", "  Cafe\u0301\n\tim\u00a0\u00a0Haus \x07\u200e"),
            ("de", "b", "Café im Haus"),
            ("de", "c", "Berlin"),
            ("en", "c", "Berlin"),
            ("fa", None, "می\u200cخواهم"),
            ("en", "d", "hi"),
        ),
        min_characters=3,
    )
    assert sorted(frame.select("language", "group", "text").rows()) == [
        ("de", "a", "Café im Haus"),
        ("fa", frame.filter(language="fa")["text_id"].item(), "می\u200cخواهم"),
    ]


def test_text_ids_are_pinned() -> None:
    frame = sampling.clean(corpus(("en", None, "one text"), ("en-GB", None, "two texts")), 1)
    assert dict(frame.select("text", "text_id").iter_rows()) == {
        "one text": "12d6879bbee1f0b6",
        "two texts": "4f60d85ddf930982",
    }


def test_the_share_of_the_evaluation_follows_the_budgets() -> None:
    assert sampling.eval_share(12_000, 1_500) == pytest.approx(1 / 6)
    assert sampling.eval_share(100, 1_000) == 0.5


def test_budgets_are_filled_and_the_last_text_is_the_one_that_fills_them() -> None:
    chosen, totals = sampling.sample(parallel(["en", "de"], 200), ["de", "en"], section(), 0, words)
    assert chosen.columns == list(sampling.COLUMNS)
    assert totals.rows() == [
        ("de", "eval", "files:test", 4, 20),
        ("de", "train", "files:test", 12, 60),
        ("en", "eval", "files:test", 4, 20),
        ("en", "train", "files:test", 12, 60),
    ]
    order = [(language, split) for language, split, _, texts, _ in totals.iter_rows() for _ in range(texts)]
    assert chosen.select("language", "split").rows() == order
    groups = {key: part["group"].to_list() for key, part in chosen.group_by("language", "split")}
    assert groups["de", "train"] == groups["en", "train"] and groups["de", "eval"] == groups["en", "eval"]


def test_long_texts_count_up_to_max_tokens_and_single_tokens_are_dropped() -> None:
    rows = [("en", f"l{i}", f"long{i} " + "word " * 30) for i in range(100)] + [
        ("en", f"s{i}", f"s{i}") for i in range(100)
    ]
    chosen, totals = sampling.sample(corpus(*rows), ["en"], section(train_tokens=60, eval_tokens=9), 0, words)
    assert totals["tokens"].to_list() == [16, 64]
    assert chosen["text"].str.starts_with("long").all()


def headed(header: str, number: int) -> str:
    return f"{header} " * 4 + f"page {number}"  # eight words and two: max_tokens cuts them off


def test_texts_that_are_equal_up_to_the_cut_are_one() -> None:
    rows = [
        *(("en", f"h{i}", headed("read more", i)) for i in range(40)),  # the header of every page
        *(("de", f"h{i}", f"der eigene Text Nummer {i} dazu") for i in range(40)),  # what translates them
        *((lang, f"c{i}", headed("cookie banner", i)) for lang in ("en", "de") for i in range(40)),
        *((lang, f"g{i}", f"{lang}{i} eigene Wörter own words") for lang in ("en", "de") for i in range(60)),
    ]
    chosen, _ = sampling.sample(corpus(*rows), ["en", "de"], section(train_tokens=400, eval_tokens=90), 0, words)
    cut = chosen.with_columns(used=pl.col("text").str.split(" ").list.head(8).list.join(" "))
    assert cut["used"].is_unique().all()
    assert not cut["text"].str.contains("cookie").any()
    assert cut["text"].str.contains("read more").sum() == 1
    # The pages that share a header are one group, so that their translations are in one split.
    assert chosen.filter(pl.col("text").str.contains("Nummer"))["split"].n_unique() == 1
    assert chosen.filter(pl.col("text").str.contains("own"))["split"].n_unique() == 2


def test_merging_by_hand() -> None:
    texts = corpus(("en", "a", "x y 1"), ("en", "b", "x y 2"), ("de", "b", "b"), ("de", "c", "u v"), ("fi", "d", "u w"))
    texts = texts.with_columns(text_id=pl.Series(list("12345")))
    merged = sampling.merge(texts, {"1": "x y", "2": "x y", "4": "u", "5": "u"})
    assert merged.select("text_id", "group").sort("text_id").rows() == [("1", "a"), ("3", "a")]
    assert sampling.merge(texts, {"1": "x y"}).sort("text_id").equals(texts)


def test_a_short_language_is_reported_with_what_it_has(caplog: pytest.LogCaptureFixture) -> None:
    few = parallel(["fi"], 9)
    with caplog.at_level(logging.WARNING):
        chosen, totals = sampling.sample(pl.concat([parallel(["en"], 200), few]), ["en", "fi"], section(), 1, words)
    assert totals.filter(language="fi")["tokens"].sum() == 45
    assert set(chosen.filter(language="fi")["group"]) == {f"g{i}" for i in range(9)}
    assert "fi: only" in caplog.text and "of 60 train tokens" in caplog.text and "en:" not in caplog.text


def test_groups_that_share_a_text_are_one() -> None:
    texts = corpus(
        ("en", "a", "one two"), ("de", "a", "eins zwei"), ("en", "b", "one pair"), ("de", "b", "eins zwei"),
        ("fi", "b", "pari"), ("fi", "c", "toinen"), ("en", "c", "another"),
    )  # fmt: skip
    groups = dict(sampling.clean(texts, 1).select("text", "group").iter_rows())
    assert {groups[text] for text in ("one two", "eins zwei", "one pair", "pari")} == {"a"}
    assert groups["toinen"] == groups["another"] == "c"


def test_a_language_without_texts_is_an_error() -> None:
    texts = corpus(("en", "a", "a long enough text"), ("ja", "a", "短い"))
    with pytest.raises(UserError, match=r"no text of 'ja' is left: none of its 1 .*min_characters = 5.*with texts: en"):
        sampling.sample(texts, ["en", "ja"], section(min_characters=5), 0, words)


def test_only_as_many_texts_are_tokenized_as_are_needed() -> None:
    counted: list[str] = []

    def count(texts: list[str]) -> list[list[int]]:
        counted.extend(texts)
        return words(texts)

    sampling.sample(parallel(["en"], 5_000), ["en"], section(), 0, count)
    assert 0 < len(counted) <= 600


def test_another_seed_is_another_sample() -> None:
    texts = parallel(["en"], 200)
    draws = [set(sampling.sample(texts, ["en"], section(), seed, words)[0]["text_id"]) for seed in (0, 1)]
    assert draws[0] != draws[1]


rows = st.lists(
    st.tuples(
        st.sampled_from(["en", "de", "ja"]), st.sampled_from("abcdefgh"), st.text("xyz ", min_size=1, max_size=6)
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(rows=rows, seed=st.integers(0, 5), order=st.randoms(use_true_random=False))
def test_properties_of_every_sample(rows: list[tuple[str, str, str]], seed: int, order: random.Random) -> None:
    texts = corpus(*rows)
    present = sampling.clean(texts, 1)["language"].unique().sort().to_list()
    if not present:
        return
    try:
        chosen, totals = sampling.sample(texts, present, section(train_tokens=6, eval_tokens=3), seed, words)
    except UserError as error:  # so few texts that one split of a language is empty
        assert re.search(r"'(en|de|ja)' has no text for the (train|eval) split", str(error))
        return
    order.shuffle(rows)
    again, _ = sampling.sample(corpus(*rows), present, section(train_tokens=6, eval_tokens=3), seed, words)
    assert chosen.equals(again)
    assert chosen.group_by("group").agg(pl.col("split").n_unique())["split"].eq(1).all()
    assert chosen["text_id"].is_unique().all() and chosen["text"].is_unique().all()
    assert totals["texts"].sum() == chosen.height
    for language, split, _, _, tokens in totals.iter_rows():
        part = chosen.filter(pl.col("language") == language, pl.col("split") == split)
        assert sum(map(len, words(part["text"].to_list()))) == tokens
    for language in present:
        clean = sampling.clean(texts, 1)
        alone = sampling.split(clean.filter(language=language), 0.3, seed)
        together = sampling.split(clean, 0.3, seed).filter(language=language)
        assert alone.equals(together)
