"""The stage `steer` on a tiny model: what it writes, and that its batches change nothing."""

import json
from pathlib import Path

import polars as pl
from test_browse_stage import Tokenizer, browse, folder  # noqa: F401
from test_neurons_stages import SAE_AT, model, stage  # noqa: F401

from babelscope.corpus import lid
from babelscope.models import loading
from babelscope.steering import vectors


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
