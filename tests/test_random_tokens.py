"""Random tokens as a language that owns nothing: by hand, and stage `score` on a tiny model."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import torch
from test_browse_stage import WIDE, Tokenizer, browse, folder  # noqa: F401
from test_neurons_stages import SAE_AT, model, stage  # noqa: F401

from babelscope import sae
from babelscope.features import random_tokens
from babelscope.models import hookpoints, loading, tokens


class Vocabulary(Tokenizer):
    """Of 99 tokens, of which the first is special."""

    all_special_ids, all_special_tokens = (1,), ("<s>",)

    def __len__(self) -> int:
        return 99

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


def test_sequences_of_random_tokens() -> None:
    texts = tokens.random_texts(Vocabulary(), 90, 12_001, 25, 0)
    assert len(texts) == 481 and set(texts.lengths.tolist()) == {25}
    drawn = texts.frame["token_ids"].explode()
    assert set(drawn) == set(range(90)) - {1}  # neither special ones, nor those without an embedding
    often = drawn.value_counts()["count"]
    assert 90 < often.min() < 12_025 / 89 < often.max() < 190
    assert next(iter(texts)).ids[:1] == (1,)
    assert texts.frame.equals(tokens.random_texts(Vocabulary(), 90, 12_001, 25, 0).frame)
    assert not texts.frame.equals(tokens.random_texts(Vocabulary(), 90, 12_001, 25, 1).frame)


def test_units_that_random_tokens_own_as_a_language_would() -> None:
    rows = [(7, "en", 40), (7, "tr", 10), (8, "en", 40), (9, "tr", 8), (10, "en", 1)]
    counts = pl.DataFrame(rows, schema=["unit", "language", "tokens"], orient="row").with_columns(layer=3)
    totals = pl.DataFrame({"language": ["en", "tr"], "tokens": [100, 20]})
    # The highest rates are 0.5 (of tr), 0.4, 0.4 and 0.01, of which random tokens must reach half.
    random = pl.DataFrame({"layer": [3] * 4, "unit": [7, 8, 9, 11], "rate": [0.24, 0.2, 0.19, 0.9]})
    kept = random_tokens.without(counts, totals, random, 0.5).collect()
    assert kept.rows() == [row for row in counts.rows() if row[0] != 8] and kept.columns == counts.columns
    assert set(random_tokens.without(counts, totals, random, 0.4).collect()["unit"]) == {10}


def test_the_stage_leaves_out_what_fires_on_random_tokens(folder: Path, model: Any, monkeypatch: Any) -> None:  # noqa: F811
    monkeypatch.setattr(loading, "load_tokenizer", lambda section: Vocabulary())
    browse()
    stage("score")
    features = pl.read_parquet("data/scores/features.parquet")
    assert "features_on_random_tokens" not in json.loads(Path("metrics/score.json").read_text())
    content = json.loads(Path("params.yaml").read_text())
    content["score"]["random_tokens"] = 200
    Path("params.yaml").write_text(json.dumps(content))
    stage("score")
    after = pl.read_parquet("data/scores/features.parquet")
    numbers = json.loads(Path("metrics/score.json").read_text())

    # By hand: the same sequences one by one. Texts have 6.5 tokens on average, and the peak is the own language's rate.
    totals = pl.read_parquet(f"data/counts/{SAE_AT}.totals.parquet")
    length = round(totals["tokens"].sum() / totals["texts"].sum())
    texts = list(tokens.random_texts(Vocabulary(), 99, 200, length, 0))
    fired = {name: torch.zeros(64) for name in (SAE_AT, WIDE)}
    for text in texts:
        seen = hookpoints.read(model, [SAE_AT, WIDE], input_ids=torch.tensor([text.ids]))
        for name, count in fired.items():
            values, indices = sae.load(Path("data/sae"), name).encode(seen[name][0, 1:].half().float())
            count.index_add_(0, indices[values > 0], torch.ones(int((values > 0).sum())))
    rate = [
        float(fired[name][unit]) / (length * len(texts)) for name, unit in features.select("hookpoint", "unit").rows()
    ]
    alike = pl.Series(rate) >= 0.5 * features["probability"]
    key = ["hookpoint", "unit", "language"]
    assert 0 < alike.sum() < len(features)
    assert sorted(after.select(key).rows()) == sorted(features.filter(~alike).select(key).rows())
    assert numbers["features_on_random_tokens"] == alike.sum() and numbers["features"] == len(after)
    # `similarity` and `shared_by` hold all candidates.
    assert numbers["shared_by/1"] >= len(features)
    browse()
    stage("score")
