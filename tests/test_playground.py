"""`babelscope try` and `babelscope features`: what they say of a sentence and of a language."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import playground_example as example
import polars as pl
import pytest
import stand_ins
import torch

from babelscope import cli, config
from babelscope.core import terminal
from babelscope.core.errors import UserError
from babelscope.core.paths import Paths
from babelscope.models import hookpoints
from babelscope.playground import listing, sentence
from babelscope.playground.reading import Reader

TURKISH = stand_ins.text("tr", 5, 4, "playground")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("playground")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        example.build(path)
        yield path


@pytest.fixture(scope="module")
def reader(folder: Path) -> Reader:
    return Reader(config.load(), Paths())


@pytest.mark.parametrize("language", example.LANGUAGES)
def test_the_firings_are_those_of_the_model_and_the_planted_features_tell_the_language(
    reader: Reader, language: str
) -> None:
    text = stand_ins.text(language, 3, 6, "playground")
    found = reader.read(text)
    assert found.language == language == next(iter(found.scores)) and not found.left_out
    assert "".join(found.pieces) == text and len(found.pieces) == len(found.fires)
    ids = torch.tensor([reader.tokenize(text).ids])
    wanted: dict[str, float] = {}
    for name in example.HOOKPOINTS:
        x = hookpoints.read(reader.model, [name], input_ids=ids)[name][0, 1:].half()
        values, indices = reader.saes[name].encode(x)
        for value, unit in zip(values.flatten().tolist(), indices.flatten().tolist(), strict=True):
            wanted[f"{name}/{unit}"] = max(value, wanted.get(f"{name}/{unit}", 0.0))
    largest: dict[str, float] = {}
    for fires in found.fires:
        assert [share for _, share in fires] == sorted((share for _, share in fires), reverse=True)
        for number, share in fires:
            feature = reader.features[number]
            largest[feature.id] = max(share * feature.largest, largest.get(feature.id, 0.0))
    known = {feature.id for feature in reader.features}
    assert largest == pytest.approx({key: value for key, value in wanted.items() if key in known and value > 0})


def test_the_features_are_those_selected_with_what_the_counts_say(reader: Reader) -> None:
    selected = pl.read_parquet("data/scores/features.parquet")
    assert {one.id for one in reader.features} == {f"{at}/{unit}" for at, unit in selected["hookpoint", "unit"].rows()}
    one = reader.features[0]
    hookpoint, _, unit = one.id.rpartition("/")
    counts = pl.read_parquet(f"data/counts/{hookpoint}.parquet").filter(unit=int(unit))
    own = counts.filter(language=one.languages[0])
    assert one.largest == counts["max"].max() and one.typical == own["sum"].item() / own["tokens"].item()
    assert one.label == f"{hookpoint.split('.')[1]}/{unit}"


def test_a_strength_adds_what_the_features_add_to_a_token_of_the_language(reader: Reader) -> None:
    selected = pl.read_parquet("data/scores/features.parquet")
    for name, vector in reader.vectors("tr").items():
        counts, totals = (pl.read_parquet(f"data/counts/{name}{end}.parquet").filter(language="tr")
                          for end in ("", ".totals"))  # fmt: skip
        units = selected.filter(hookpoint=name, language="tr")["unit"].to_list()
        sums = dict(counts.select("unit", "sum").iter_rows())
        wanted = sum(sums[unit] / totals["tokens"].item() * reader.saes[name].W_dec[unit] for unit in units)
        torch.testing.assert_close(vector[0], wanted)
    one = reader.features[-1]
    hookpoint, _, unit = one.id.rpartition("/")
    [(name, vector)] = reader.vectors(one.id).items()
    assert name == hookpoint
    torch.testing.assert_close(vector[0], one.typical * reader.saes[name].W_dec[int(unit)])


def test_a_continuation_is_the_models_own_without_strength_and_changes_with_it(reader: Reader) -> None:
    plain = reader.continuation(TURKISH, "tr", 0.0)
    ids = list(reader.tokenize(TURKISH).ids)
    with torch.inference_mode():
        for _ in range(8):
            logits = reader.model(torch.tensor([ids])).logits[0, -1]
            logits[reader.model.generation_config.eos_token_id] = -torch.inf
            ids.append(int(logits.argmax()))
    assert reader.tokenizer.decode(ids, skip_special_tokens=True).endswith(plain) and plain
    assert reader.continuation(TURKISH, "ja", 40.0) != plain == reader.continuation(TURKISH, "ja", 0.0)


def test_what_cannot_be_read_is_refused(reader: Reader) -> None:
    with pytest.raises(UserError, match="the text has no tokens"):
        reader.read("")
    with pytest.raises(UserError, match="'layers.1.mlp/999' has no features; allowed: en, "):
        reader.vectors("layers.1.mlp/999")
    long = reader.read(" ".join([TURKISH] * 9))
    assert long.left_out and sum(map(len, long.pieces)) < 9 * len(TURKISH)


def test_the_command_prints_the_tokens_and_writes_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["try", TURKISH, "--html", "sentence.html"])
    printed = capsys.readouterr().out
    assert printed.startswith("language  tr  firings per feature: tr ") and "\nfastText  tr  probability: " in printed
    lines = printed.partition("\n\n")[2].splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        piece.strip() for piece in Reader(config.load(), Paths()).read(TURKISH).pieces
    ]
    assert any("tr 1/1 " in line or "tr 2/1 " in line for line in lines)  # latent 1 was planted for tr
    assert (folder / "sentence.html").read_text().startswith("<!doctype html>")


def test_the_page_of_a_sentence_shows_its_tokens_and_runs_nothing_in_them(
    folder: Path, chromium: Any, tmp_path: Path
) -> None:
    hostile = f"{TURKISH} <script>window.hacked = 1</script>"
    sentence.main(hostile, tmp_path / "sentence.html")
    page = chromium.new_page(viewport={"width": 390, "height": 800})
    noticed: list[str] = []
    page.on("console", lambda message: noticed.append(message.text))
    page.on("pageerror", lambda error: noticed.append(str(error)))
    page.goto((tmp_path / "sentence.html").as_uri())
    page.wait_for_selector("html[data-ready]")
    assert hostile.startswith(page.inner_text("#pieces").replace("\xa0", " "))
    assert "The features say Turkish (tr)" in page.inner_text("#verdict")
    everything = page.locator("#features tbody tr").count()
    assert everything and page.locator("#ask, #steer, #features button").count() == 0
    fires = [one for one in page.query_selector_all("#pieces button") if one.get_attribute("title") != "0 features"]
    fires[0].click()
    assert 0 < page.locator("#features tbody tr").count() <= everything
    assert page.get_attribute("#pieces button[aria-pressed=true]", "title") in page.inner_text("#listed").replace(
        " fire", ""
    )
    page.click("#pieces button[aria-pressed=true]")
    page.select_option("#language", "tr")
    owners = page.locator("#features tbody td.label:nth-child(2)").all_inner_texts()
    assert 0 < len(owners) < everything and set(owners) == {"Turkish (tr)"}
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("window.hacked") is None and noticed == []
    page.close()


def test_the_first_features_of_a_language_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["features", "tr", "--number", "2"])
    printed = capsys.readouterr().out
    selected = pl.read_parquet("data/scores/features.parquet").filter(language="tr").sort("rank")
    lines = printed.splitlines()
    assert lines[0] == f"tr: 2 of {len(selected)} features, the most specific first"
    first = selected.row(0, named=True)
    assert lines[3].split()[:2] == ["1", f"{first['layer']}/{first['unit']}"] and lines[5] == ""
    assert f"{100 * first['probability']:.1f} %" in lines[3]
    examples = pl.read_parquet("data/browse/examples.parquet").filter(
        pl.col("place") == 0, hookpoint=first["hookpoint"], unit=first["unit"], side="own"
    ).join(pl.read_parquet("data/browse/texts.parquet"), on="text_id").row(0, named=True)  # fmt: skip
    strongest = max(zip(examples["activations"], examples["pieces"], strict=True))[1]
    assert strongest.strip() in lines[3]
    cli.main(["features", "tr"])
    assert f"tr: {min(10, len(selected))} of {len(selected)} features" in capsys.readouterr().out


def test_an_unknown_language_and_missing_outputs_are_named(folder: Path, tmp_path: Path) -> None:
    params = config.load()
    with pytest.raises(UserError, match=r"trk: not a language of params.yaml; allowed: en, ja, tr \(did you mean 'tr'"):
        listing.table("trk", 3, params, Paths())
    with pytest.raises(UserError, match="features.parquet: no such file; an earlier stage writes it: dvc repro"):
        listing.table("tr", 3, params, Paths(tmp_path))


def test_columns_are_aligned_by_what_a_terminal_shows() -> None:
    assert [terminal.width(text) for text in ("abc", "日本", "த​மி", "é", "e\u0301")] == [3, 4, 3, 1, 1]
    assert terminal.aligned([["日本", "1", "x"], ["a\nb", "22", ""]], right=(1,)) == ["日本   1  x", "a b   22"]


def test_the_counts_of_a_text_of_the_corpus_are_those_of_encode(reader: Reader) -> None:
    texts = pl.read_parquet("data/corpus/texts.parquet").filter(split="train", language="tr")
    own = {f"{at}/{unit}" for at, unit in pl.read_parquet("data/scores/features.parquet")["hookpoint", "unit"].rows()}
    fired: dict[str, bool] = {}
    for text in texts["text"]:
        for fires in reader.read(text).fires:
            fired |= {reader.features[number].id: True for number, _ in fires}
    counted = {
        f"{name}/{unit}"
        for name in example.HOOKPOINTS
        for unit in pl.read_parquet(f"data/counts/{name}.parquet").filter(language="tr")["unit"]
    }
    assert set(fired) == counted & own
