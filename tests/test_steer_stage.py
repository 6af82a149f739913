"""The stage `steer` on a tiny model: what it writes, and that its batches change nothing."""

import json
import re
import threading
from pathlib import Path

import polars as pl
import pytest
import test_explain
from closure import ROOT
from test_browse_stage import Tokenizer, browse, folder  # noqa: F401
from test_neurons_stages import SAE_AT, model, stage  # noqa: F401

from babelscope import config
from babelscope.core.errors import UserError
from babelscope.corpus import lid
from babelscope.models import loading
from babelscope.steering import judge, prompts, vectors


class Lid:
    """Takes texts with an even first token for German."""

    def match(self, languages):
        return {name: name for name in languages}, {}

    def predict(self, texts):
        return pl.DataFrame({"predicted": ["de" if int(text.split()[0]) % 2 == 0 else "en" for text in texts]})


class Decoding(Tokenizer):
    def batch_decode(self, ids, skip_special_tokens):
        rows = ids if isinstance(ids, list) else ids.tolist()
        return [" ".join(str(token) for token in row if token != 1) or "9" for row in rows]


def test_the_stage_compares_methods_and_its_batches_change_nothing(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(loading, "load_tokenizer", lambda section: Decoding())
    monkeypatch.setattr(lid, "FastText", Lid)
    found = []
    for rows in (100, 3):
        browse()
        content = json.loads(Path("params.yaml").read_text())
        content["steer"] |= {
            "methods": ["diffmean", "pca", "probe", "features", "features-1", "sae-diffmean", "prompt"],
            "strengths": [1.0, 2.0], "prompts": 3, "prompt_tokens": 4, "new_tokens": 4, "batch_rows": rows,
            "sampled": 2, "tokens": 50, "bootstrap": 20,
        }  # fmt: skip
        Path("params.yaml").write_text(json.dumps(content))
        stage("steer")
        found.append((pl.read_parquet("data/steer/generations.parquet"), Path("metrics/steer.json").read_text()))
    judged = found[0][0]
    assert judged.drop("nll").equals(found[1][0].drop("nll"))
    assert [json.loads(one[1])["best"] for one in found][0] == json.loads(found[1][1])["best"]
    languages = content["languages"]
    assert (judged["prompt_language"] != judged["language"]).all()
    greedy = judged.filter(decoding="greedy").group_by("method", "language").len()
    assert set(greedy["len"]) == {3} and set(greedy["method"]) >= {"diffmean", "prompt", "nothing", "features"}
    assert set(judged.filter(decoding="sampled").group_by("method", "language").len()["len"]) == {2}
    assert judged.filter(method="nothing").group_by("prompt").agg(pl.col("text").n_unique())["text"].max() == 1
    settings = json.loads(Path("data/vectors/settings.json").read_text())
    table = vectors.read(Path("data/vectors/diffmean.safetensors"))
    steered = judged.filter(method="diffmean")["language"].unique().to_list()
    assert settings["diffmean"].keys() == set(steered) <= set(languages)
    assert settings["features"].popitem()[1]["hookpoint"] in (SAE_AT,)
    assert all(one["hookpoint"] in table and one["strength"] in (1.0, 2.0) for one in settings["diffmean"].values())
    numbers = json.loads(found[0][1])
    assert {f"development/{SAE_AT}/diffmean", "harmonic/diffmean", "verdict", "harmonic_sampled/diffmean"} <= set(
        numbers
    )
    tried = pl.read_parquet("data/steer/development.parquet")
    assert set(tried["prompts"]) == {2, 6}


@pytest.fixture
def endpoint(monkeypatch):
    """A server that finds answers relevant whose number of characters is even."""

    def answer(body):
        found = re.findall(r"Answer: (.*)", body["messages"][1]["content"])
        return test_explain.completion(str([1 - len(text) % 2 for text in found]))

    monkeypatch.setattr(test_explain, "answer", answer)
    server = test_explain.Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_prompts_may_come_from_elsewhere_and_an_endpoint_may_judge(folder, monkeypatch, endpoint):  # noqa: F811
    monkeypatch.setattr(loading, "load_tokenizer", lambda section: Decoding())
    monkeypatch.setattr(lid, "FastText", Lid)
    texts = [f"{number} {number + 1} {number + 2}" for number in range(10, 30)]
    Path("prompts").mkdir()
    Path("prompts/en.txt").write_text("\n".join(texts))
    browse()
    content = json.loads(Path("params.yaml").read_text())
    content["steer"] |= {"methods": ["diffmean"], "strengths": [2.0], "prompts": 9, "prompts_from": "prompts",
                         "new_tokens": 4, "sampled": 0, "tokens": 50, "bootstrap": 20,
                         "relevance": "endpoint"}  # fmt: skip
    content["explain"] |= {"endpoint": endpoint.url, "model": "m"}
    Path("params.yaml").write_text(json.dumps(content))
    stage("steer")
    judged = pl.read_parquet("data/steer/generations.parquet")
    assert judged["prompt"].n_unique() == 9 and set(judged["prompt"]) < set(texts)
    assert (judged["relevant"] == (judged["text"].str.len_chars() % 2 == 0)).all()
    content["steer"]["prompts_from"] = {"path": "./prompts/none", "splits": ["train"], "text": ["t"], "language": "l"}
    Path("params.yaml").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"steer\.prompts_from\.path: no folder './prompts/none'"):
        stage("sample")


def test_the_prompts_of_development_are_no_translations_of_those_of_the_test():
    rows = [(f"{language}{number}", language, str(number)) for language in ("en", "de") for number in range(20)]
    found = prompts.split(pl.DataFrame(rows, schema=["text_id", "language", "group"], orient="row"))
    by_group = found.group_by("group").agg(pl.col("split").n_unique())
    assert set(by_group["split"]) == {1}
    assert set(found.filter(split="train").group_by("language").len()["len"]) == {prompts.CHOICES}


def test_an_endpoint_judges_within_the_cost(tmp_path, endpoint, caplog):
    params = config.load(ROOT / "params.yaml")
    section = params.explain.model_copy(update={"endpoint": endpoint.url, "model": "m"})
    asked = judge.Endpoint(params.model_copy(update={"explain": section}), tmp_path)
    assert asked(["p"] * 7, ["a" * number for number in range(1, 8)]) == [False, True] * 3 + [False]
    endpoint.script = [(200, test_explain.completion("yes"))]
    assert asked(["q"], ["aa"]) == [False] and "1 of 1 replies" in caplog.text
    dear = section.model_copy(update={"price_in": 100_000.0, "max_cost": 0.5})
    before = len(endpoint.seen)
    with pytest.raises(UserError, match=r"explain\.max_cost: this would cost up to .*, or lower steer\.prompts"):
        judge.Endpoint(params.model_copy(update={"explain": dear}), tmp_path)(["new"], ["prompt"])
    assert len(endpoint.seen) == before
