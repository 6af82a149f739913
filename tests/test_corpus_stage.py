import hashlib
import json
import runpy
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from ruamel.yaml import YAML

import babelscope.models.loading
from babelscope.core.errors import UserError
from babelscope.core.paths import Paths
from babelscope.tracking.sync import changed_texts

ROOT = Path(__file__).parents[1]


def words(texts: list[str], **options: Any) -> dict[str, list[list[str]]]:
    """Stand-in for a tokenizer: a token per word."""
    return {"input_ids": [text.split() for text in texts]}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run stages/sample.py in a folder of its own, on the texts and languages given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(babelscope.models.loading, "load_tokenizer", lambda section: words)
    (tmp_path / "texts").mkdir()

    def run(texts: dict[str, list[str]], languages: list[str], **corpus: Any) -> None:
        for language, lines in texts.items():
            rows = pl.DataFrame({"group": [str(i) for i in range(len(lines))], "text": lines})
            rows.write_parquet(f"texts/{language}.parquet")
        yaml = YAML()
        params = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        params["languages"] = languages
        params["score"]["members"] = 1
        params["steer"]["prompt_languages"] = languages[:1]
        small = {"min_characters": 5, "max_tokens": 10, "train_tokens": 50, "eval_tokens": 20}
        params["corpus"].update({"source": "files", "path": "texts", "packages": []} | small | corpus)
        with open("params.yaml", "w", encoding="utf-8") as handle:
            yaml.dump(params, handle)
        runpy.run_path(str(ROOT / "stages/sample.py"))["main"]()

    return run


def test_outputs_metrics_and_closing_table(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    texts = {
        "no": [f"tekst nummer {i} er her" for i in range(100)],
        "zh_CN": [f"第 {i} 个文本" for i in range(100)],
        "he": [f"טקסט מספר {i}" for i in range(6)],
    }
    with caplog.at_level("INFO"):
        run(texts, ["no", "zh-CN", "he"])
    frame = pl.read_parquet("data/corpus/texts.parquet")
    assert frame.schema == dict.fromkeys(("text_id", "language", "split", "group", "source", "text"), pl.String)
    assert frame["language"].unique(maintain_order=True).to_list() == ["no", "zh-CN", "he"]
    assert frame.group_by("group").agg(pl.col("split").n_unique())["split"].max() == 1
    metrics = json.loads(Path("metrics/sample.json").read_text())
    assert metrics["languages"] == 3 and metrics["short_of_budget"] == 1
    assert metrics["texts"] == frame.height
    assert metrics["train_tokens/no"] == 50 and metrics["train_texts/no"] == 10 and metrics["eval_tokens/no"] == 20
    assert metrics["train_tokens/zh-CN"] == 51 and metrics["eval_tokens/zh-CN"] == 21
    assert metrics["train_texts/he"] + metrics["eval_texts/he"] == 6
    for ending in ("", "/files:texts"):
        totals = [
            metrics[f"{split}_tokens/{name}{ending}"] for split in ("train", "eval") for name in ("no", "zh-CN", "he")
        ]
        assert metrics["tokens"] == sum(totals)
    assert "language" in caplog.text and "zh-CN" in caplog.text and "he: only" in caplog.text


def test_the_same_input_gives_the_same_bytes(run: Any) -> None:
    texts = {language: [f"{language} text number {i}" for i in range(100)] for language in ("en", "de")}
    outputs = [Path("data/corpus/texts.parquet"), Path("metrics/sample.json")]
    hashes = []
    for _ in range(2):
        run(texts, ["en", "de"])
        hashes.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in outputs])
    assert hashes[0] == hashes[1]


def test_texts_that_change_after_they_were_read_are_noticed(run: Any) -> None:
    texts = {language: [f"{language} text number {i}" for i in range(100)] for language in ("en", "de")}
    params: dict[str, Any] = {"corpus": {"path": "texts"}}
    run(texts, ["en", "de"])
    assert changed_texts(Paths(), params) is None and changed_texts(Paths(), {"corpus": {"path": None}}) is None
    Path("texts/en.txt").write_text("one text more, in another file\n")
    assert changed_texts(Paths(), params) == Path("texts")


def test_a_language_more_or_less_changes_no_text_of_those_that_train(run: Any) -> None:
    texts = {language: [f"{language} text number {i}" for i in range(100)] for language in ("en", "de")}
    run(texts, ["en", "de"])
    trained, before = Path("data/corpus/train.parquet").read_bytes(), pl.read_parquet("data/corpus/texts.parquet")
    held_out, training = (before.filter(split=split)["group"][0] for split in ("eval", "train"))
    dutch = [f"nl text number {i}" for i in range(100)]
    dutch[int(held_out)] = dutch[int(training)] = "nl text that joins two groups"
    dutch[3] = before.filter(language="de")["text"][0]  # in two languages: without the list, both are dropped
    with_dutch = texts | {"nl": dutch}
    run(with_dutch, ["en", "nl", "de"], train_languages=["de", "en"])
    after = pl.read_parquet("data/corpus/texts.parquet")
    assert after["language"].unique(maintain_order=True).to_list() == ["en", "nl", "de"]
    assert Path("data/corpus/train.parquet").read_bytes() == trained
    assert after.filter(pl.col("language") != "nl").equals(before)
    found = after.filter(language="nl")
    assert set(found["split"]) == {"eval", "train"} and set(found["text"]) <= set(dutch) - {
        "nl text that joins two groups", dutch[3]
    }  # fmt: skip
    assert after.group_by("group").agg(pl.col("split").n_unique())["split"].max() == 1
    run(with_dutch, ["nl", "de"], train_languages=["en", "de"])
    assert Path("data/corpus/train.parquet").read_bytes() == trained
    assert pl.read_parquet("data/corpus/texts.parquet")["language"].unique(maintain_order=True).to_list() == [
        "nl",
        "de",
    ]


def test_an_unknown_language_leaves_no_output(run: Any) -> None:
    with pytest.raises(UserError, match="has no 'nn'; it offers: no"):
        run({"no": ["en tekst på norsk"]}, ["no", "nn"])
    assert not Path("data").exists() and not Path("metrics").exists()


def test_languages_that_fasttext_cannot_tell_are_said_before_anything_is_read(run: Any, caplog: Any) -> None:
    with pytest.raises(UserError, match="corpus.path: 'texts' holds no"), caplog.at_level("WARNING"):
        run({}, ["en", "zh-CN", "zh-TW", "tlh"])
    assert [message.partition(":")[0] for message in caplog.messages] == ["zh-CN", "zh-TW", "tlh"]
    assert "from the comparison with fastText (identify): fastText's lid.176 does not tell it from zh-TW" in caplog.text


GERMAN = [f"Das ist der {i}. Satz, und er steht in deutscher Sprache da." for i in range(40)]
ENGLISH = [f"This is sentence number {i}, which is written in plain English." for i in range(40)]


def test_texts_in_another_language_are_dropped_where_that_is_asked_for(run: Any, caplog: Any) -> None:
    mixed = {"de": GERMAN + ENGLISH[:10], "en": ENGLISH[10:] + ["OK 17 :-) foo"]}
    run(mixed, ["de", "en"])
    assert "dropped_by_lid" not in json.loads(Path("metrics/sample.json").read_text())
    with caplog.at_level("INFO"):
        run(mixed, ["de", "en"], lid=0.8, train_tokens=500, eval_tokens=500)
    assert json.loads(Path("metrics/sample.json").read_text())["dropped_by_lid"] == 10
    assert "de: dropped 10 texts that fastText assigns to another language" in caplog.text
    kept = pl.read_parquet("data/corpus/texts.parquet")
    assert set(kept.filter(language="de")["text"]) <= set(GERMAN)
    assert kept["text"].str.starts_with("OK").any()  # too uncertain to be dropped


def test_the_stage_reads_data_sets_and_records_their_licences(run: Any) -> None:
    for code, lines in (("deu_Latn", GERMAN), ("eng_Latn", ENGLISH)):
        for split in ("dev", "devtest"):
            path = Path(f"flores/{code}/{split}.parquet")
            path.parent.mkdir(parents=True, exist_ok=True)
            texts = [f"{split} {line}" for line in lines]
            pl.DataFrame({"id": range(len(lines)), "text": texts}).write_parquet(path)
    configs = [
        {"config_name": code, "data_files": [{"split": s, "path": f"{code}/{s}.parquet"} for s in ("dev", "devtest")]}
        for code in ("deu_Latn", "eng_Latn")
    ]
    Path("flores/README.md").write_text(f"---\nlicense: cc-by-sa-4.0\nconfigs: {json.dumps(configs)}\n---\n")
    run({}, ["de", "en"], source="huggingface", path=None, datasets=[{"name": "flores-plus", "path": "./flores"}])
    texts = pl.read_parquet("data/corpus/texts.parquet")
    assert set(texts["source"]) == {"huggingface:flores"} and set(texts["language"]) == {"de", "en"}
    # Each in one split only, with its translation.
    assert texts.group_by("group").agg(pl.col("split").n_unique())["split"].max() == 1
    sources = json.loads(Path("data/corpus/sources.json").read_text())
    assert sources == {"sources": [{"path": "flores", "revision": None, "license": "cc-by-sa-4.0"}]}
