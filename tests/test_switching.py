"""The stage `switching`: sentences that switch from one language to another."""

import json
import math
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import transformers
from closure import ROOT

from babelscope import config
from babelscope.core.errors import UserError
from babelscope.core.paths import Paths
from babelscope.models import loading
from babelscope.sae import checkpoint
from babelscope.sae.autoencoder import SAE
from babelscope.switching import measure, sentences
from babelscope.switching import run as switching

LANGUAGES, HOOKPOINT, WIDTH, TOKENS = ["en", "de", "fi"], "layers.0", 8, 10
LOGIT = 3.0  # of every token of the language that the last token has, in the planted model


def spans(*tokens: str) -> tuple[str, list[tuple[int, int]]]:
    ends = [sum(map(len, tokens[: i + 1])) for i in range(len(tokens))]
    return "".join(tokens), [(end - len(token), end) for end, token in zip(ends, tokens, strict=True)]


def test_a_text_is_cut_at_the_start_of_a_word_next_to_its_middle() -> None:
    assert sentences.switch_point(*spans(*"abcdefghi")) == 4  # no spaces: the middle
    assert sentences.switch_point(*spans(*"abcdefgh")) is None  # shorter than 4 + 5 tokens
    # The middle of 12 tokens is 6, inside of a word; the words next to it begin at 4 and at 7. A space may be a part of
    # the token before or after it.
    assert sentences.switch_point(*spans("o", "n", "e", ",", " t", "w", "o", " t", "h", "r", "e", "e")) == 7
    assert sentences.switch_point(*spans("o", "n", "e ", "t", "wo ", "th", "r", "e", "e", "f", "o", "ur")) == 5
    # A space too near to the end does not count.
    assert sentences.switch_point(*spans("o", "n", "e", "t", "w", "o", "t", "h", "r", "e ", "e", "f")) == 6
    # The middle is one of four tokens that share a character.
    text, ends = spans(*"abcdefghijk")
    ends[4:8] = [(4, 8)] * 4
    assert sentences.switch_point(text, ends) == 4


def test_every_first_part_is_continued_in_every_language() -> None:
    parts = pl.DataFrame({
        "group": ["g", "g", "h"], "language": ["en", "de", "en"], "switch": [4, 5, 4],
        "token_ids": [list(range(10)), list(range(20, 30)), list(range(40, 52))],
    })  # fmt: skip
    found = sentences.join(parts)
    assert found["text_id"].to_list() == ["g/en/en", "g/en/de", "g/de/en", "g/de/de", "h/en/en"]
    assert found["switch"].to_list() == [4, 4, 5, 5, 4]
    ids = dict(found.select("text_id", "token_ids").iter_rows())
    assert ids["g/en/de"] == [0, 1, 2, 3, 25, 26, 27, 28, 29]
    assert ids["g/de/en"] == [20, 21, 22, 23, 24, 4, 5, 6, 7, 8]
    assert ids["g/en/en"] == list(range(9)) and ids["h/en/en"] == list(range(40, 49))


def test_changes_by_hand() -> None:
    pairs = [("en", "en"), ("en", "de"), ("de", "en"), ("de", "de")]
    frame = pl.DataFrame(
        [("g", *pair) for pair in pairs] + [("h", *pair) for pair in pairs[:1]],
        schema=["group", "language", "other"], orient="row",
    )  # fmt: skip
    clean = torch.tensor([5.0, 20, 15, 10, 7], dtype=torch.float64)
    without_en = clean + torch.tensor([10.0, -1, 4, 2, 8], dtype=torch.float64)
    without_de = clean + torch.tensor([1.0, 8, math.nan, 5, 3], dtype=torch.float64)
    found = measure.changes(frame, clean, torch.stack([without_en, without_de]), ["en", "de"], 20, 0)
    # The second group has one language only.
    assert found.select("language", "other", "groups").rows() == [("en", "de", 1), ("de", "en", 1)]
    first, second = found.select(switching.CHANGES).rows()
    # Five tokens: (20 - 5) / 5; without German 8 / 5 and 1 / 5, their difference; without English; German alone.
    assert first == pytest.approx([3.0, 1.6, 0.2, 1.4, -0.2, 1.0])
    assert second[:4] == pytest.approx([1.0, 0.8, 0.4, 0.4]) and math.isnan(second[4])
    assert found["effect_low"].to_list() == [None, None]  # of too few groups


def test_the_interval_is_over_the_groups() -> None:
    names = ["g1", "g2", "g3", "g4", "g5"]
    frame = pl.DataFrame({
        "group": names * 4, "language": ["en"] * 10 + ["de"] * 10, "other": (["en"] * 5 + ["de"] * 5) * 2
    })  # fmt: skip
    clean = torch.ones(20, dtype=torch.float64)
    change = torch.zeros(2, 20, dtype=torch.float64)
    change[1, 5:10] = torch.tensor([1.0, 2, 3, 4, 5])
    found = measure.changes(frame, clean, clean + change, ["en", "de"], 500, 0)
    low, mean, high = found.select("effect_low", "effect", "effect_high").row(0)
    assert mean == pytest.approx(0.6) and 0.2 < low < 0.5 and 0.7 < high < 1.0
    assert found.select("effect_low", "effect", "effect_high").row(1) == (0, 0, 0)


class Tokenizer:
    """A token per number, behind one special token."""

    def __call__(self, texts: Any, **options: Any) -> dict[str, Any]:
        if options.get("return_special_tokens_mask"):
            return {"input_ids": [1, 5], "special_tokens_mask": [1, 0]}
        found = {"input_ids": [[int(word) for word in text.split()] for text in texts]}
        if options.get("return_offsets_mapping"):
            found["offset_mapping"] = [[match.span() for match in re.finditer(r"\d+", text)] for text in texts]
        return found


def planted() -> Any:
    """A model whose last token alone says the language: it gives `LOGIT` to that language's tokens, 0 to all others."""
    llama = transformers.LlamaConfig(
        vocab_size=2 + TOKENS * len(LANGUAGES), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=WIDTH,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(llama).eval().requires_grad_(False)
    for block in model.model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    table = torch.zeros(llama.vocab_size, WIDTH)
    for code in range(len(LANGUAGES)):
        table[2 + TOKENS * code : 2 + TOKENS * (code + 1), code] = 1
    model.model.embed_tokens.weight.copy_(2 * table)
    model.lm_head.weight.copy_(LOGIT / math.sqrt(WIDTH) * table)
    return model


def lay_out(folder: Path, groups: int, length: int = 10) -> tuple[config.Config, Paths]:
    """Three groups in three languages; one latent per language, which reads and writes its dimension."""
    (folder / "data/corpus").mkdir(parents=True)
    paths = Paths(folder)
    rows = [
        (f"{name}{group}", name, "eval", f"g{group}", "", " ".join(str(2 + TOKENS * code + i) for i in range(length)))
        for group in range(3)
        for code, name in enumerate(LANGUAGES)
    ]
    names = ["text_id", "language", "split", "group", "source", "text"]
    pl.DataFrame(rows, schema=names, orient="row").write_parquet(paths.texts)
    eye = torch.eye(len(LANGUAGES), WIDTH)
    # With the bias, an activation is 2.5, and what the latent writes is the 2 that it reads.
    sae = SAE(eye, 0.8 * eye, torch.full((len(LANGUAGES),), 0.5), torch.zeros(WIDTH), 1)
    checkpoint.save(sae, paths.saes / HOOKPOINT, {"model_name": "m", "hook_name": HOOKPOINT})
    for path in (paths.features, paths.counts(HOOKPOINT)):
        path.parent.mkdir(parents=True)
    features = pl.DataFrame({"kind": "sae", "hookpoint": HOOKPOINT, "layer": 0, "unit": [0, 1, 2],
                             "language": LANGUAGES})  # fmt: skip
    features.write_parquet(paths.features)
    # The mean activation of the features where they fire: 2 + 0.5.
    features.select("layer", "unit", "language", tokens=4, sum=10.0).write_parquet(paths.counts(HOOKPOINT))
    content = config.read_yaml(ROOT / "params.yaml") | {"languages": LANGUAGES, "hookpoints": [HOOKPOINT]}
    content["stability"] |= {"hookpoints": []}
    content["steer"] |= {"hookpoints": [], "prompt_languages": ["en"]}
    content["switching"] = {"groups": groups}
    content["hardware"] |= {"accelerator": "cpu"}
    return config.parse(content), paths


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    made = planted()
    monkeypatch.setattr(loading, "load_tokenizer", lambda section: Tokenizer())
    monkeypatch.setattr(loading, "load_model", lambda section, dtype: made)
    return made


def test_the_planted_model_gives_what_the_formulas_say(model: Any, tmp_path: Path) -> None:
    params, paths = lay_out(tmp_path, 2)
    switching.run(params, paths)
    found = pl.read_parquet(paths.switching / "pairs.parquet")
    assert found.schema == pl.Schema(switching.PAIR_SCHEMA)
    assert found["groups"].to_list() == [2] * 6
    vocabulary = 2 + TOKENS * len(LANGUAGES)
    # NLL of a token: of the language of the token before it; of another one; and if nothing says the language.
    other = math.log(TOKENS * math.exp(LOGIT) + vocabulary - TOKENS)
    same, unknown = other - LOGIT, math.log(vocabulary)
    expected = {
        "cost": (other - same) / 5,  # only the first of five tokens comes after the other language
        "switched": 4 * (unknown - same) / 5,  # the first one is predicted by a token of the first language
        "stayed": 0.0,
        "effect": 4 * (unknown - same) / 5,
        "host": (unknown - other) / 5,  # without its own features, the first language does not speak against the second
        "alone": unknown - same,
    }
    for key, value in expected.items():
        assert found[key].to_list() == pytest.approx([value] * 6, abs=1e-4), key
    positions = pl.read_parquet(paths.switching / "positions.parquet")
    assert positions.schema == pl.Schema(switching.POSITION_SCHEMA) and len(positions) == 9 * 9
    before, after = pl.col("position") < 0, pl.col("position") >= 0
    silent = 0.5 / 2.5  # the bias alone
    switches = positions.filter(pl.col("language") != pl.col("other"))
    for rows, host, intruder in ((before, 1.0, silent), (after, silent, 1.0)):
        assert switches.filter(rows)["host"].to_list() == pytest.approx([host] * switches.filter(rows).height)
        assert switches.filter(rows)["intruder"].to_list() == pytest.approx([intruder] * switches.filter(rows).height)
    alone = positions.filter(pl.col("language") == pl.col("other"))
    assert alone["host"].to_list() == alone["intruder"].to_list() == pytest.approx([1.0] * 27)
    numbers = json.loads(paths.metrics("switching").read_text())
    assert numbers["groups"] == 2 and numbers["texts"] == 18 and numbers["pairs"] == 6
    assert numbers["effect/fi"] == pytest.approx(numbers["effect"]) == pytest.approx(expected["effect"], abs=1e-4)
    assert numbers["intruder_after"] == pytest.approx(1.0) and numbers["intruder_before"] == pytest.approx(silent)
    assert numbers["intruder_alone"] == pytest.approx(1.0) and numbers["host_after"] == pytest.approx(silent)


def test_a_language_without_features_is_left_out(model: Any, tmp_path: Path) -> None:
    params, paths = lay_out(tmp_path, 5)
    pl.read_parquet(paths.features).filter(pl.col("language") != "de").write_parquet(paths.features)
    switching.run(params, paths)
    found = pl.read_parquet(paths.switching / "pairs.parquet")
    assert found.select("language", "other").rows() == [("en", "fi"), ("fi", "en")]
    pl.read_parquet(paths.features).filter(pl.col("language") == "en").write_parquet(paths.features)
    switching.run(params, paths)
    assert json.loads(paths.metrics("switching").read_text()) == {}


def test_pre_activations_are_means_over_a_languages_features(tmp_path: Path) -> None:
    _, paths = lay_out(tmp_path, 1)
    rows = [(0, "en", 2, 8.0), (1, "en", 5, 10.0), (2, "fi", 1, 1.0), (2, "en", 1, 7.0)]
    pl.DataFrame(rows, schema=["unit", "language", "tokens", "sum"], orient="row").write_parquet(
        paths.counts(HOOKPOINT)
    )
    features = pl.DataFrame({"hookpoint": HOOKPOINT, "unit": [0, 1, 2], "language": ["en", "en", "fi"]})
    sae = checkpoint.load(paths.saes, HOOKPOINT)
    weight, bias = measure.directions(sae, HOOKPOINT, features, LANGUAGES, paths)
    # English: latents 0 and 1 with mean activations of 4 and 2, half of each; Finnish: latent 2 with one of 1.
    assert weight[0, :3].tolist() == pytest.approx([1 / 8, 1 / 4, 0.0])
    assert weight[2, :3].tolist() == pytest.approx([0.0, 0.0, 1.0])
    assert bias[[0, 2]].tolist() == pytest.approx([0.5 * 3 / 8, 0.5])
    assert weight[1].isnan().all() and bias[1].isnan()


def test_without_groups_there_are_empty_tables(tmp_path: Path) -> None:
    params, paths = lay_out(tmp_path, 0)
    switching.run(params, paths)
    assert pl.read_parquet(paths.switching / "pairs.parquet").schema == pl.Schema(switching.PAIR_SCHEMA)
    assert pl.read_parquet(paths.switching / "positions.parquet").schema == pl.Schema(switching.POSITION_SCHEMA)
    assert json.loads(paths.metrics("switching").read_text()) == {}


def test_a_corpus_of_short_texts_is_refused(model: Any, tmp_path: Path) -> None:
    params, paths = lay_out(tmp_path, 3, length=8)
    with pytest.raises(UserError, match="switching.groups: .* no held-out text of at least 9 tokens in two languages"):
        switching.run(params, paths)
