"""The embedded default's model, as it is: it speaks its languages, and what the pipeline needs of it holds."""

import math

import polars as pl
import pytest
import torch
from closure import ROOT
from torch.nn import functional as F  # noqa: N812

from babelscope import config
from babelscope.corpus import gettext_catalogs
from babelscope.models import hookpoints, loading, nll, partial, probing, tokens

PARAMS = config.load(ROOT / "params.yaml")


@pytest.fixture(scope="module")
def model():
    return loading.load_model(PARAMS.model, "float32")


@pytest.fixture(scope="module")
def texts():
    """Three texts of each language, tokenized."""
    frame = gettext_catalogs.read(PARAMS.corpus, PARAMS.languages)
    long = frame.filter(pl.col("text").str.len_chars().is_between(60, 120)).unique("text", maintain_order=True)
    some = long.group_by("language", maintain_order=True).head(3)
    ids = [f"{language}-{number}" for number, language in enumerate(some["language"])]
    ready = tokens.tokenize(loading.load_tokenizer(PARAMS.model), ids, some["text"].to_list(), 64)
    return list(zip(some["language"], some["text"], ready, strict=True))


def test_it_predicts_text_in_every_one_of_its_languages(model, texts):
    assert {language for language, _, _ in texts} == set(PARAMS.languages)
    bits, size = dict.fromkeys(PARAMS.languages, 0.0), dict.fromkeys(PARAMS.languages, 0)
    for language, text, ready in texts:
        assert ready.special == 1 and ready.ids[0] == model.config.bos_token_id
        ids = torch.tensor([ready.ids])
        target = torch.ones((1, ids.shape[1] - 1), dtype=torch.bool)
        found = nll.token_nll(model, ids, torch.ones_like(ids), target)[0].double()
        bits[language] += float(found.sum()) / math.log(2)
        size[language] += len(text.encode())
    per_byte = {language: bits[language] / size[language] for language in bits}
    # Uniform over the vocabulary: some 5 bits per byte of Latin script.
    assert max(per_byte.values()) < 2.8, per_byte


def test_an_nll_is_within_1e_4_nats_of_float64(model, texts):
    entering = []
    handle = model.lm_head.register_forward_pre_hook(lambda _module, args: entering.append(args[0]))
    some = [torch.tensor([ready.ids[:20]]) for _, _, ready in texts[::3]]
    found = [nll.token_nll(model, ids, torch.ones_like(ids), torch.ones((1, ids.shape[1] - 1)) > 0) for ids in some]
    handle.remove()
    weight = model.lm_head.weight.double()
    for ids, x, per_token in zip(some, entering, found, strict=True):
        exact = F.cross_entropy(x[0, :-1].double() @ weight.T, ids[0, 1:], reduction="none")
        assert (per_token[0].double() - exact).abs().max() < 1e-4


def test_passes_over_parts_of_texts_are_exact_and_a_change_stays_in_its_token(model):
    hookpoints.resolve(model, PARAMS.hookpoints)
    assert nll.head_of(model) is not None
    assert partial.suits(model, PARAMS.corpus.max_tokens)
    assert probing.stays_in_place(model, PARAMS.hookpoints[0])
