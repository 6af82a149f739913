"""What the feature browser is made of: each computed thing by hand or against the straightforward way."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from torch.nn import functional as F  # noqa: N812

from babelscope.browse import lens, tables
from babelscope.browse.effects import effects, interval
from babelscope.browse.firings import BANDS, BINS, Firings
from babelscope.browse.units import probabilities, units
from babelscope.features.counter import whole_texts
from babelscope.features.examples import Features
from babelscope.models import hookpoints, logit_lens, tokens
from babelscope.models.pieces import by_piece, cut, pieces
from babelscope.sae.autoencoder import SAE

D, VOCABULARY = 16, 60
TINY = {"vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**TINY, "num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": 0}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, LLAMA),
    "gpt2": (transformers.GPT2Config, {"vocab_size": VOCABULARY, "n_embd": D, "n_layer": 3, "n_head": 2}),
    "gemma2": (transformers.Gemma2Config, {**LLAMA, "head_dim": 8, "sliding_window": 4}),
    "gpt_neox": (transformers.GPTNeoXConfig, {**TINY, "intermediate_size": 24}),
}


def make(family: str = "llama") -> Any:
    kind, options = FAMILIES[family]
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(kind(**options)).eval().requires_grad_(False)
    for parameter in model.parameters():  # the usual initialisation is so small that a change would not be seen
        if parameter.dim() > 1:
            parameter.mul_(6)
        else:
            parameter.add_(torch.rand(parameter.shape))
    return model


def random_sae(seed: int, latents: int = 48, k: int = 4) -> SAE:
    g = torch.Generator().manual_seed(seed)
    decoder = F.normalize(torch.randn(latents, D, generator=g), dim=1)
    return SAE(decoder * 0.7, decoder, torch.zeros(latents), torch.randn(D, generator=g) * 0.1, k)


# --- units


def candidates(*rows: tuple[int, int, list[str], float]) -> pl.DataFrame:
    """A row per (layer, unit) and language, with the entropy."""
    long = [(f"layers.{a}.mlp", a, u, name, len(own), h) for a, u, own, h in rows for name in own]
    return pl.DataFrame(long, schema=["hookpoint", "layer", "unit", "language", "members", "entropy"], orient="row")


def test_units_are_the_selected_ones_and_the_shared_ones_of_lowest_entropy() -> None:
    found = candidates(
        (9, 1, ["de"], 0.1), (2, 7, ["fi", "de"], 0.7), (2, 3, ["en", "de", "fi"], 1.0), (2, 5, ["en", "fi"], 0.7),
        (9, 4, ["en"], 0.3),
    )  # fmt: skip
    selected = found.filter(layer=9, unit=1)
    options = (["en", "de", "fi"], ["layers.9.mlp", "layers.2.mlp"])
    every = units(selected, found, *options, None)
    assert every.rows() == [
        ("layers.9.mlp", 9, 1, "specific", ["de"], 1, 0.1),
        ("layers.2.mlp", 2, 3, "shared", ["en", "de", "fi"], 3, 1.0),
        ("layers.2.mlp", 2, 5, "shared", ["en", "fi"], 2, 0.7),
        ("layers.2.mlp", 2, 7, "shared", ["de", "fi"], 2, 0.7),
    ]
    for shared, wanted in ((0, []), (1, [5]), (2, [5, 7]), (9, [3, 5, 7])):  # of a tie, the smaller unit
        assert units(selected, found, *options, shared)["unit"].to_list() == [1, *wanted]
    assert units(found, found.reverse(), *options, 0).height == 5  # what was selected is never cut
    assert units(found.clear(), found.clear(), *options, None).is_empty()


def test_a_limit_keeps_the_first_features_of_every_language() -> None:
    found = candidates((2, 1, ["en"], 0.1), (2, 2, ["en"], 0.2), (2, 3, ["fi"], 0.3), (2, 4, ["fi"], 0.4))
    selected = found.with_columns(rank=pl.Series([1, 2, 1, 2]))
    options = (["en", "fi"], ["layers.2.mlp"], 0)
    for limit, wanted in ((1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (9, [1, 2, 3, 4]), (None, [1, 2, 3, 4])):
        assert units(selected, found, *options, limit)["unit"].to_list() == wanted


def test_probabilities_have_a_row_for_every_language() -> None:
    one = candidates((2, 5, ["en", "fi"], 0.7))
    features = units(one, one, ["en", "de", "fi"], ["layers.2.mlp"], None)
    counts = one.with_columns(tokens=pl.Series([4, 3]))
    totals = pl.DataFrame({"language": ["en", "de", "fi"], "tokens": [8, 9, 12]})
    found = probabilities(features, counts, totals)
    assert found.select("language", "tokens", "probability").rows() == [("en", 4, 0.5), ("de", 0, 0), ("fi", 3, 0.25)]


# --- pieces


def spans(text: str, sizes: list[int]) -> list[tuple[int, int]]:
    """Spans of byte-level tokens of so many UTF-8 bytes each, as such tokenizers give them."""
    owner = [at for at, character in enumerate(text) for _ in character.encode()]
    result, start = [], 0
    for size in sizes:
        result.append((owner[start], owner[start + size - 1] + 1))
        start += size
    return result


@pytest.mark.parametrize(
    ("text", "sizes", "parts", "piece"),
    [
        ("a bc", [1, 2, 1], ["a", " b", "c"], [0, 1, 2]),
        # Three bytes to a character, cut after the second; the vowel sign is drawn with its letter.
        ("மரம்", [2, 1, 2, 1, 2, 1, 3], ["ம", "ர", "ம்"], [0, 0, 1, 1, 2, 2, 2]),
        ("ab שם", [2, 2, 1, 2], ["ab", " ש", "ם"], [0, 1, 1, 2]),
        ("日本", [4, 2], ["日本"], [0, 0]),
        ("e\u0301x", [1, 2, 1], ["e\u0301", "x"], [0, 0, 1]),
        ("👩\u200d👧!", [4, 3, 4, 1], ["👩\u200d👧", "!"], [0, 0, 0, 1]),
        ("abc", [1], ["a"], [0]),  # the text was cut
        ("", [], [], []),
    ],
)
def test_pieces_are_whole_characters(text: str, sizes: list[int], parts: list[str], piece: list[int]) -> None:
    assert pieces(text, spans(text, sizes)) == (parts, piece)


def test_white_space_that_no_token_covers_goes_to_the_next_one() -> None:
    assert pieces("a  bc ", [(0, 1), (3, 4), (4, 5)]) == (["a", "  b", "c"], [0, 1, 2])
    assert pieces(" ab", [(0, 0), (1, 2), (2, 2), (2, 3)]) == ([" a", "b"], [0, 0, 0, 1])


def test_a_piece_has_the_largest_activation_of_its_tokens() -> None:
    assert by_piece([0.0, 2.0, 1.0, 0.0, 5.0], [0, 1, 1, 2, 2], 4) == [0.0, 2.0, 5.0, 0.0]


# --- firings


def corpus(count: int = 90) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations, text and language (of 3) of every token; some texts begin alike."""
    g = torch.Generator().manual_seed(6)
    length = torch.randint(1, 8, (count,), generator=g)
    text = torch.arange(count).repeat_interleave(length)
    x = torch.randn(len(text), D, generator=g)
    for number in range(0, count - 9, 9):  # the same first token, of the same language
        x[(text == number + 9).nonzero()[0]] = x[(text == 0).nonzero()[0]]
    return x, text, (text % 3)


@pytest.mark.parametrize("size", [1, 40, 10_000])
def test_firings_are_those_of_looking_at_every_token(size: int) -> None:
    x, text, language = corpus()
    sae, chosen = random_sae(1), torch.tensor([2, 3, 11, 40])
    owns = torch.tensor([[True, False, False], [False, True, True], [True, True, True], [False, False, True]])
    values, indices = sae.encode(x)
    dense = torch.zeros(len(x), 48).scatter(1, indices, values)[:, chosen]
    largest = dense.amax(0)
    found = Firings(Features(sae, chosen), owns, largest, texts=3, longest=5)
    for start, end in whole_texts(text, size):
        found.add(x[start:end], text[start:end], language[start:end])
    for feature in range(4):
        mine = owns[feature][language]
        shown = {side: [one for one in found.examples(side) if one.feature == feature] for side in tables.SIDES}
        for side, wanted in (("own", mine), ("other", ~mine)):
            peaks = {int(t): dense[(text == t), feature].max().item() for t in text[wanted].unique()}
            best = sorted((t for t in peaks if peaks[t] > 0), key=lambda t: (-peaks[t], t))  # noqa: B023
            assert [one.text for one in shown[side]] == best[:3]
        drawn = {int(t): int(t) * 2654435761 % 2**32 >> 8 for t in text[mine].unique()}
        expected = []
        for low, high in BANDS:
            peaks = {t: dense[(text == t), feature].max().item() / largest[feature].item() for t in drawn}
            inside = [t for t in drawn if low < peaks[t] < high]
            expected += [max(inside, key=drawn.__getitem__)] if inside else []
        best = [one.text for one in shown["own"]]
        assert [one.text for one in shown["sample"]] == [t for t in expected if t not in best]
        assert [one.place for one in shown["sample"]] == list(range(len(shown["sample"])))
        for number, side in enumerate((mine, ~mine)):
            fires = dense[side, feature]
            bins = (fires[fires > 0] / largest[feature] * BINS).long().clamp(max=BINS - 1)
            assert found.histogram[number, feature].tolist() == torch.bincount(bins, minlength=BINS).tolist()
        for one in [one for side in tables.SIDES for one in shown[side]]:
            whole = dense[text == one.text, one.feature][:5]
            assert one.activations.tolist() == pytest.approx([*whole.tolist(), *[0.0] * (5 - len(whole))], rel=1e-5)


def test_tables_of_what_was_collected() -> None:
    """An SAE whose latents are the dimensions; two features, three texts."""
    eye = torch.eye(4)
    sae = SAE(eye, eye, torch.zeros(4), torch.zeros(4), 4)
    one = candidates((2, 1, ["en"], 0.0), (2, 3, ["de"], 0.5))
    features = units(one, one, ["en", "de"], ["layers.2.mlp"], None).with_columns(largest=pl.Series([4.0, 2.0]))
    owns = torch.tensor([[True, False], [False, True]])
    latents = Features(sae, torch.tensor([1, 3]))
    found = Firings(latents, owns, torch.tensor([4.0, 2.0]), texts=2, longest=8)
    x = torch.zeros(5, 4)
    x[0, 1], x[1, 1], x[3, 1], x[4, 3] = 1.0, 4.0, 0.123456, 2.0
    text, language = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1])
    found.add(x, text, language)
    content = pl.DataFrame({"text_id": ["a", "b"], "language": ["en", "de"], "split": "train", "text": ["x yz", "மர"]})
    spans = [[(0, 1), (1, 3), (3, 4)], [(0, 1), (1, 2)]]
    in_pieces = cut(content, list(zip(content["text"], spans, strict=True)))
    assert in_pieces["pieces"].to_list() == [["x", " y", "z"], ["ம", "ர"]]
    firings = {"layers.2.mlp": found}
    assert tables.examples(features, firings, ["a", "b"], in_pieces).drop("hookpoint", "layer").rows() == [
        (1, "own", 0, "a", [1.0, 4.0, 0.0]),
        (3, "own", 0, "b", [0.0, 2.0]),
        (1, "other", 0, "b", [pytest.approx(0.1235, abs=1e-7), 0.0]),
    ]
    bars = tables.histograms(features, firings)
    assert len(bars) == 2 * BINS and bars["high"][BINS - 1] == 4.0 and bars["low"][BINS] == 0.0
    assert bars.filter(unit=1).select("bin", "own", "other").filter(pl.col("own") + pl.col("other") > 0).rows() == [
        (0, 0, 1), (6, 1, 0), (23, 1, 0)
    ]  # fmt: skip
    ends = lens.extremes([torch.tensor([[1.0, 5.0, -2.0], [0.0, 0.123456, 3.0]])], 1)
    named = tables.tokens(features, {"layers.2.mlp": ends}, {1: "b", 2: "c", 0: "a"})
    assert named.drop("hookpoint", "layer").rows() == [
        (1, "promoted", 0, 1, "b", 5.0), (1, "suppressed", 0, 2, "c", -2.0),
        (3, "promoted", 0, 2, "c", 3.0), (3, "suppressed", 0, 0, "a", 0.0),
    ]  # fmt: skip
    near = tables.neighbours(
        features, {"layers.2.mlp": SimpleNamespace(W_dec=torch.tensor([[1.0, 0], [2, 2], [0, 3], [-1, 0]]))}
    )
    assert near.drop("hookpoint", "layer").rows() == [
        (1, 0, 0, pytest.approx(0.7071)), (1, 1, 2, pytest.approx(0.7071)), (1, 2, 3, pytest.approx(-0.7071)),
        (3, 0, 2, 0.0), (3, 1, 1, pytest.approx(-0.7071)), (3, 2, 0, -1.0),
    ]  # fmt: skip
    nothing = tables.tokens(features, {}, {})
    assert nothing.is_empty() and nothing.schema == named.schema


# --- logit lens


@pytest.mark.parametrize("family", FAMILIES)
def test_direct_logits_are_the_limit_of_writing_the_direction(family: str) -> None:
    """At a residual stream whose norm's scale is 1, along the direction, less the part that changes that scale."""
    model = make(family)
    if family == "gemma2":
        model.config.final_logit_softcapping = None
    g = torch.Generator().manual_seed(2)
    hidden, direction = torch.randn(1, D, generator=g), torch.randn(3, D, generator=g)
    centred = family in ("gpt2", "gpt_neox")
    gain, found_centred = logit_lens.final_norm(model)
    assert found_centred == centred and gain.shape == (D,)
    hidden = hidden - hidden.mean() if centred else hidden
    hidden = hidden / hidden.square().mean().sqrt()
    found = torch.cat(list(logit_lens.direct_logits(model, direction)))
    assert found.shape == (3, VOCABULARY)
    seen = direction - direction.mean(1, keepdim=True) if centred else direction
    across = seen - (seen @ hidden.T) / D * hidden  # the rest of the direction leaves the scale as it is
    limit = torch.func.jvp(lambda h: hookpoints.logits_of(model, h), (hidden.repeat(3, 1),), (across,))[1]
    expected = torch.cat(list(logit_lens.direct_logits(model, across)))
    torch.testing.assert_close(limit, expected, rtol=1e-3, atol=1e-3)


def test_extremes_come_from_both_ends_and_ties_go_to_the_smaller_id() -> None:
    rows = torch.tensor([[3.0, -1.0, 3.0, 2.0, -1.0, 3.0]])
    found = lens.extremes([rows, -rows], 2)
    assert found.promoted.tolist() == [[0, 2], [1, 4]] and found.suppressed.tolist() == [[1, 4], [0, 2]]
    assert found.promoted_logits.tolist() == [[3.0, 3.0], [1.0, 1.0]]
    assert found.suppressed_logits.tolist() == [[-1.0, -1.0], [-3.0, -3.0]]
    assert lens.extremes([], 2).promoted.shape == (0, 2)


def test_rows_of_the_embedding_without_a_token_are_not_listed() -> None:
    rows = torch.tensor([[3.0, 9.0, -1.0, 2.0, 8.0, -7.0]])  # ids 1, 4 and 5 are no tokens
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 2, "c": 3, "beyond": 6})
    has_text = lens.tokens_of(tokenizer, 6)
    assert has_text.tolist() == [True, False, True, True, False, False]
    found = lens.extremes([rows, rows], 2, has_text)
    assert found.promoted.tolist() == [[0, 3]] * 2 and found.promoted_logits.tolist() == [[3.0, 2.0]] * 2
    assert found.suppressed.tolist() == [[2, 3]] * 2 and found.suppressed_logits.tolist() == [[-1.0, 2.0]] * 2
    assert lens.extremes([rows], 5, has_text).promoted.tolist() == [[0, 3, 2]]


class Bytes:
    """A byte-level tokenizer of four tokens, and one of another kind."""

    raw = ("Ġtree", "à®", "Ġ×", "<0xE0>", "木")

    def decode(self, ids: list[int]) -> str:
        return (" tree", "\ufffd", " \ufffd", "\ufffd", "木")[ids[0]]

    def convert_ids_to_tokens(self, number: int) -> str:
        return self.raw[number]


def test_parts_of_characters_are_written_as_their_bytes() -> None:
    found = lens.readable(Bytes(), [4, 0, 1, 2, 3, 0])
    assert found == {0: " tree", 1: "\\xe0\\xae", 2: " \\xd7", 3: "<0xE0>", 4: "木"}


def test_the_byte_alphabet_is_that_of_byte_level_tokenizers() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(lens._BYTES) == set(ByteLevel.alphabet()) and sorted(lens._BYTES.values()) == list(range(256))
    for character in ("ம", " ", "\n", "é", "日"):
        (raw, _), *_ = ByteLevel(add_prefix_space=False).pre_tokenize_str(character)
        assert bytes(lens._BYTES[one] for one in raw).decode() == character


# --- effects


def test_effects_are_those_of_one_pass_with_and_one_without_the_feature() -> None:
    model = make()
    names = ["layers.1.mlp", "layers.2.mlp"]
    saes = {name: random_sae(seed) for seed, name in enumerate(names)}
    g = torch.Generator().manual_seed(3)
    texts = tokens.by_length(
        [tokens.TokenizedText(f"t{i}", (1, *torch.randint(2, VOCABULARY, (2 + i % 5,), generator=g).tolist()), 1)
         for i in range(12)]
    )  # fmt: skip
    features = []
    for name in names:
        x = [hookpoints.read(model, [name], input_ids=torch.tensor([text.ids]))[name][0, 1:] for text in texts]
        values, indices = saes[name].encode(torch.cat(x))
        often = torch.bincount(indices[values > 0], minlength=48).argsort(descending=True).tolist()
        features += [(name, unit) for unit in (*often[:4], often[-1])]
    wanted = [[f"t{number}", f"t{number + 3}"] if number % 3 else [] for number in range(len(features))]
    found = effects(model, saes, features, texts, wanted, 40)
    by_id = {text.text_id: text for text in texts}

    def nll(text: tokens.TokenizedText, edits: dict[str, Any]) -> float:
        ids = torch.tensor([text.ids])
        with hookpoints.editing(model, edits):
            logits = model(input_ids=ids, use_cache=False).logits[0]
        return float(F.cross_entropy(logits[:-1].detach().double(), ids[0, 1:], reduction="sum"))

    changed = 0
    for (name, unit), ids, row in zip(features, wanted, found.iter_rows(named=True), strict=True):
        if not ids:
            assert row == {"delta": None, "delta_low": None, "delta_high": None, "delta_tokens": 0, "delta_texts": 0}
            continue

        def without(x: torch.Tensor, name: str = name, unit: int = unit) -> torch.Tensor:
            values, indices = saes[name].encode(x)
            z = torch.zeros(*x.shape[:-1], 48).scatter(-1, indices, values)[..., unit, None]
            z[:, 0] = 0.0  # the special token is never changed
            return x - z * saes[name].W_dec[unit]

        count = sum(by_id[one].content_tokens for one in ids)
        delta = sum(nll(by_id[one], {name: without}) - nll(by_id[one], {}) for one in ids) / count
        assert row["delta_tokens"] == count and row["delta_texts"] == 2 and row["delta_low"] is None
        assert row["delta"] == pytest.approx(delta, abs=1e-5)
        changed += not math.isclose(delta, 0.0, abs_tol=1e-6)
    assert changed >= 4
    assert effects(model, saes, features, texts, [[]] * len(features), 40)["delta"].null_count() == len(features)


def test_the_interval_of_an_effect_is_over_texts() -> None:
    assert interval(np.array([2.0, 4.0, 6.0]), np.array([1, 2, 3])) == (2.0, 2.0)  # the same in every text
    low, high = interval(np.array([1.0] * 50 + [3.0] * 50), np.ones(100, dtype=np.int64))
    assert low == pytest.approx(2 - 1.96 * 0.1, abs=0.03) and high == pytest.approx(2 + 1.96 * 0.1, abs=0.03)
    model, name, text = make(), "layers.1.mlp", [tokens.TokenizedText(f"t{i}", (1, 2 + i, 9, 7), 1) for i in range(6)]
    found = effects(
        model, {name: random_sae(1)}, [(name, 3)], tokens.by_length(text), [[f"t{i}" for i in range(6)]], 40
    )
    row = found.row(0, named=True)
    assert row["delta_texts"] == 6 and row["delta_low"] <= row["delta"] <= row["delta_high"]
