"""The stage `steer` on a tiny model: what it feeds, and that its batches change nothing."""

import json
from pathlib import Path

import polars as pl
from test_browse_stage import Tokenizer, browse, folder  # noqa: F401
from test_neurons_stages import model, stage  # noqa: F401

from babelscope.core import fingerprint as fingerprints
from babelscope.corpus import lid
from babelscope.models import loading
from babelscope.steering import generation


class Lid:
    """Takes every text for German."""

    def match(self, languages):
        return {name: name for name in languages}, {}

    def predict(self, texts):
        return pl.DataFrame({"predicted": ["de"] * len(texts)})


class Decoding(Tokenizer):
    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(str(token) for token in row if token != 1) for row in ids.tolist()]


def test_the_stage_feeds_special_tokens_and_its_batches_change_nothing(folder, monkeypatch):  # noqa: F811
    seen = []

    def fingerprint(name, params, inputs):
        seen.append(params)
        return original(name, params, inputs)

    original = fingerprints.fingerprint
    monkeypatch.setattr(fingerprints, "fingerprint", fingerprint)
    monkeypatch.setattr(loading, "load_tokenizer", lambda section: Decoding())
    monkeypatch.setattr(lid, "FastText", Lid)
    fed = []
    generate = generation.generate
    monkeypatch.setattr(
        generation, "generate", lambda m, ids, *a, **k: fed.append((ids, k)) or generate(m, ids, *a, **k)
    )
    found = []
    for rows in (100, 3):
        browse()
        content = json.loads(Path("params.yaml").read_text())
        content["steer"] |= {"strengths": [2.0], "prompts": 3, "prompt_tokens": 3, "new_tokens": 4, "batch_rows": rows}
        Path("params.yaml").write_text(json.dumps(content))
        stage("steer")
        found.append(pl.read_parquet("data/steer/generations.parquet"))
    assert found[0].equals(found[1]) and len(found[0]) == 3 * (1 + 3) and len(fed) > 2
    assert all((ids[:, 0] == 1).all() and ids.shape[1] == 4 and how["special"] == 1 for ids, how in fed)
    assert found[0]["prompt"].str.split(" ").list.len().to_list() == [3] * 12
    assert seen[0]["ratio"] == content["score"]["ratio"]
