"""Stage `script`: romanised and shuffled texts, the rule, and the stage itself on a tiny model."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from test_browse_stage import browse, folder  # noqa: F401
from test_neurons_stages import LANGUAGES, corpus, model, stage  # noqa: F401

from babelscope.models import hookpoints
from babelscope.sae import checkpoint
from babelscope.script import firings, texts
from babelscope.script import run as script


def test_romanising_leaves_latin_letters_only() -> None:
    assert texts.romanise("Галерея, déjà vu") == "Galereya, deja vu"
    assert texts.replaced_share("Галерея") == 1 and texts.replaced_share("déjà vu") == 2 / 6
    assert texts.replaced_share("12 %") == 0


def test_shuffling_keeps_the_words_and_knows_scripts_without_spaces() -> None:
    text = "one two three four five six"
    shuffled = texts.shuffle_words(text, "a", 0)
    assert shuffled != text and sorted(shuffled.split()) == sorted(text.split())
    assert shuffled == texts.shuffle_words(text, "a", 0)
    assert len({texts.shuffle_words(text, name, seed) for name in "ab" for seed in (0, 1)}) > 1
    chinese = texts.shuffle_words("家谱的基础媒体路径 GEDCOM 文件", "a", 0)
    assert sorted(chinese.replace(" ", "")) == sorted("家谱的基础媒体路径GEDCOM文件") and "GEDCOM" in chinese
    assert chinese.count(" ") <= 2


def test_the_rule() -> None:
    rows = [("ru", 0.2, 0.1, 0.2), ("ru", 0.2, 0.099, 0.0), ("ru", 0.0, 0.0, 0.1), ("en", 0.2, 0.0, 0.2)]
    frame = pl.DataFrame(rows, schema=["language", "original", "romanised", "shuffled"], orient="row")
    found = firings.judged(frame, {"ru": 0.5, "en": 0.49})
    assert found["kept_romanised"].to_list() == [0.5, pytest.approx(0.495), None, 0.0]
    assert found["kept_shuffled"].to_list() == [1.0, 0.0, None, 1.0]
    # As half its rate or more is kept; less; it never fires; and romanising hardly changes English.
    assert found["script_bound"].to_list() == [False, True, None, None]


def test_rates_are_over_the_tokens_of_the_own_language() -> None:
    fired = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 5.0]])
    rate = firings.rates(fired, torch.tensor([4, 8, 10]), torch.tensor([0, 0, 1]), torch.tensor([0, 1]))
    assert rate.tolist() == [4 / 12, 5 / 10]


def test_the_stage(folder: Path, model: Any, monkeypatch: Any) -> None:  # noqa: F811
    # "Romanising" writes token 98 for every token of `fi`, and leaves the other texts as they are.
    monkeypatch.setattr(script, "romanise", lambda text: " ".join("98" if int(w) >= 62 else w for w in text.split()))
    shares = {"en": 0.0, "de": 0.1, "fi": 0.9}
    of_text = dict(corpus().select("text", "language").iter_rows())
    monkeypatch.setattr(
        script, "replaced_share", lambda text: next(shares[lang] for t, lang in of_text.items() if text.startswith(t))
    )
    browse()
    content = json.loads(Path("params.yaml").read_text())
    content["script"] = {"tokens": 10_000, "ablation_tokens": 20}
    Path("params.yaml").write_text(json.dumps(content))
    stage("script")
    found = pl.read_parquet("data/script/features.parquet")
    selected = pl.read_parquet("data/scores/features.parquet")
    assert sorted(found.select("hookpoint", "unit", "language").rows()) == sorted(
        selected.select("hookpoint", "unit", "language").rows()
    )
    same = found.filter(language="en")
    assert same["original"].equals(same["romanised"]) and same["script_bound"].null_count() == len(same)
    assert found.filter(language="fi")["script_bound"].drop_nulls().any()

    # A rate from its definition.
    row = found.filter(pl.col("language") == "fi", pl.col("original") > 0).row(0, named=True)
    dictionary = checkpoint.load(Path("data/sae"), row["hookpoint"])
    for version, write in (("original", lambda text: text), ("romanised", script.romanise)):
        fires = tokens = 0
        for text in corpus().filter(split="eval", language="fi")["text"]:
            ids = [1, *(int(word) for word in write(text).split())]
            x = hookpoints.read(model, [row["hookpoint"]], input_ids=torch.tensor([ids]))[row["hookpoint"]][0, 1:]
            values, indices = dictionary.encode(x.half())
            fires += int(((values > 0) & (indices == row["unit"])).sum())
            tokens += len(x)
        assert row[version] == pytest.approx(fires / tokens)

    nll = pl.read_parquet("data/script/nll.parquet")
    assert nll.select("language", "version").rows() == [("fi", "original"), ("fi", "romanised")]
    numbers = json.loads(Path("metrics/script.json").read_text())
    assert numbers["own_original/fi"] == nll["delta"][0]
    assert numbers["tested"] == found["script_bound"].count()
    assert numbers["script_bound"] == found["script_bound"].sum()
    share = (found.filter(language="fi")["kept_romanised"] >= 0.5).mean()
    assert numbers["still_romanised/fi"] == share


def test_it_can_be_left_out(folder: Path) -> None:  # noqa: F811
    browse()
    content = json.loads(Path("params.yaml").read_text())
    content["script"] = {"tokens": 0, "ablation_tokens": 0}
    Path("params.yaml").write_text(json.dumps(content))
    stage("script")
    assert pl.read_parquet("data/script/features.parquet").is_empty()
    assert json.loads(Path("metrics/script.json").read_text()) == {}


def test_means_are_the_same_whatever_the_order_of_groups() -> None:
    languages = [f"l{number}" for number in range(13)]
    rows = [("h", unit, name, 1.0, 1.0, 1.0, kept, 1.0, None) for count, name in enumerate(languages, 3)
            for unit, kept in enumerate([1.0] * (count // 2) + [0.0] * (count - count // 2))]  # fmt: skip
    found = pl.DataFrame(rows, schema=script.SCHEMA, orient="row")
    nothing = pl.DataFrame(schema=script.NLL)
    values = {script.figures(found, nothing, {}, languages)["still_romanised"] for _ in range(50)}
    assert len(values) == 1
