"""Neurons from the texts to identification and ablation: the stages themselves, on a tiny model."""

import copy
import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import transformers
from closure import ROOT
from torch.nn import functional as F  # noqa: N812

from babelscope import config
from babelscope.config import schema
from babelscope.core.errors import UserError
from babelscope.core.paths import Paths
from babelscope.models import hookpoints, loading
from babelscope.report.parts import ReportInputs
from babelscope.report.sections import ablation
from babelscope.report.sections.own import own_and_others
from babelscope.sae import checkpoint
from babelscope.sae.autoencoder import SAE
from babelscope.tracking import summary

LANGUAGES, SAE_AT = ["en", "de", "fi"], "layers.1.mlp"
NEURONS = ["layers.2.mlp.act_fn", "layers.0.mlp.act_fn"]


def tokenizer(texts: Any, return_special_tokens_mask: bool = False, **_: Any) -> dict[str, Any]:
    """A token per number, behind one special token."""
    if return_special_tokens_mask:
        return {"input_ids": [1, 5], "special_tokens_mask": [1, 0]}
    return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def corpus() -> pl.DataFrame:
    """24 texts of 4 to 9 tokens in each of three languages; nearly every token belongs to one language."""
    g = torch.Generator().manual_seed(5)
    rows = []
    for code, language in enumerate(LANGUAGES):
        for number in range(24):
            ids = torch.randint(2 + 30 * code, 34 + 30 * code, (4 + number % 6,), generator=g).tolist()
            split = "eval" if number % 4 == 0 else "train"
            rows.append((f"{language}{number:02d}", language, split, str(number), " ".join(map(str, ids))))
    columns = ["text_id", "language", "split", "group", "text"]
    return pl.DataFrame(rows, schema=columns, orient="row").with_columns(source=pl.lit("made"))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        initializer_range=0.3,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(llama).eval().requires_grad_(False)


def set_params(**changes: Any) -> None:
    content = config.read_yaml(ROOT / "params.yaml") | {"languages": LANGUAGES, "hookpoints": [SAE_AT]}
    content["neurons"] = {"hookpoints": [], "quantile": 0.8, "top_rate": 0.3}
    content["stability"] |= {"hookpoints": []}
    content["steer"] |= {"hookpoints": [], "prompt_languages": ["en"], "prompts": 3}
    content["extract"] |= {"dtype": "float32", "batch_tokens": 64}
    content["score"] |= {"example_rate": 0.2, "token_rate": 0.05, "members": 1}
    content["ablate"] |= {"methods": ["feature"], "control_draws": 1, "bootstrap": 20, "by_layer": True}
    content["hardware"] |= {"accelerator": "cpu"}
    for section, values in changes.items():
        content[section] |= values
    Path("params.yaml").write_text(json.dumps(content))  # which is YAML, too


def stage(name: str, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"stages/{name}.py", *arguments])
        runpy.run_path(str(ROOT / f"stages/{name}.py"))["main"]()


def check_primary_method() -> None:
    """The headline, the pictures and MLflow show the same method, whatever the order of `ablate.methods`."""
    for methods, primary in ((["additive", "feature"], "feature"), (["directional", "additive"], "directional")):
        set_params(ablate={"methods": methods})
        stage("ablate")
        numbers = json.loads(Path("metrics/ablate.json").read_text())
        nll, by_layer = (pl.read_parquet(f"data/ablation/{name}.parquet") for name in ("nll", "by_layer"))
        mine = nll.filter(pl.col("control").is_null(), pl.col("ablated") == pl.col("evaluated"), method=primary)
        own = dict(mine.select("ablated", "delta").iter_rows())
        assert numbers["primary_method"] == primary
        assert {name: numbers[f"dnll_own/{name}"] for name in LANGUAGES} == own
        other = next(name for name in methods if name != primary)
        assert numbers[f"{other}/own"] != numbers["own"]
        features = pl.read_parquet("data/scores/features.parquet")
        params = config.load().model_dump()
        inputs = ReportInputs(params, features, nll, by_layer, {"ablate": numbers}, {}, {})
        shown = own_and_others(inputs)
        assert dict(zip(shown["language"], shown["own"], strict=True)) == own
        assert ablation.method(dataclasses.replace(inputs, metrics={})) == schema.primary_method(sorted(methods))
        series = summary.numbers(Paths(), params, {"ablate": numbers})[1]
        at = by_layer.filter(method=primary, ablated="en", evaluated="en")["delta"].item()
        assert series["dnll_own_by_layer/en", 1] == at


def own_neurons(model: Any, ids: list[int]) -> dict[str, torch.Tensor]:
    """The neurons' activations on a text's own tokens, `[tokens, 24]` by hookpoint."""
    seen = hookpoints.read(model, NEURONS, input_ids=torch.tensor([[1, *ids]]))
    return {name: x[0, 1:] for name, x in seen.items()}


def test_neurons_from_the_texts_to_identification_and_ablation(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_tokenizer", lambda section: tokenizer)
    monkeypatch.setattr(loading, "load_skeleton", lambda section: model)
    monkeypatch.setattr(loading, "load_model", lambda section, dtype: copy.deepcopy(model))
    texts = corpus()
    Path("data/corpus").mkdir(parents=True)
    for name in ("texts", "train"):
        texts.write_parquet(f"data/corpus/{name}.parquet")
    g = torch.Generator().manual_seed(2)
    decoder = F.normalize(torch.randn(64, 16, generator=g), dim=1)
    dictionary = SAE(decoder * 0.7, decoder, torch.zeros(64), torch.zeros(16), 3)
    checkpoint.save(dictionary, Path("data/sae") / SAE_AT, {"model_name": "tiny", "hook_name": SAE_AT})

    def tables() -> dict[str, pl.DataFrame]:
        names = ["scores/features", "identify/predictions", "ablation/nll", "ablation/by_layer", "ablation/control"]
        return {name: pl.read_parquet(f"data/{name}.parquet") for name in names}

    set_params()
    for name in ("extract", "neurons", "encode", "extend", "score", "identify", "ablate"):
        stage(name, *([SAE_AT] if name == "encode" else []))
    alone = tables()
    set_params(neurons={"hookpoints": NEURONS}, ablate={"methods": ["feature", "neuron"]})
    for name in ("neurons", "score", "identify", "ablate"):
        stage(name)
    both = tables()
    check_primary_method()
    assert not Path(".scratch").exists() or not list(Path(".scratch").iterdir())

    features = both["scores/features"]
    assert features.filter(kind="sae").equals(alone["scores/features"]) and len(alone["scores/features"])
    neurons = features.filter(kind="neuron")
    assert set(neurons["hookpoint"]) == set(NEURONS) and set(neurons["language"]) == set(LANGUAGES)
    assert neurons.select("hookpoint", "unit").n_unique() == round(0.3 * 48)
    totals = pl.read_parquet("data/neurons/totals.parquet")
    assert totals.equals(pl.read_parquet(f"data/counts/{SAE_AT}.totals.parquet"))
    train = {name: [row for row in texts.filter(split="train", language=name)["text"]] for name in LANGUAGES}
    for row in neurons.iter_rows(named=True):
        on = torch.cat([own_neurons(model, [int(i) for i in t.split()])[row["hookpoint"]][:, row["unit"]]
                        for t in train[row["language"]]])  # fmt: skip
        assert row["probability"] == pytest.approx((on > 0).double().mean().item())

    predicted = both["identify/predictions"]
    assert predicted.filter(pl.col("method") != "neuron-count").equals(alone["identify/predictions"])
    owned = {name: neurons.filter(language=name).select("hookpoint", "unit").rows() for name in LANGUAGES}
    for row in texts.filter(split="eval").iter_rows(named=True):
        seen = own_neurons(model, [int(i) for i in row["text"].split()])
        firings = {
            name: sum(int((seen[place][:, unit] > 0).sum()) for place, unit in units) for name, units in owned.items()
        }
        mine = predicted.filter(text_id=row["text_id"], method="neuron-count")
        best = dict(zip(mine["normalize"], mine["score"], strict=True))
        assert best["none"] == max(firings.values())
        assert best["units"] == pytest.approx(max(firings[name] / len(owned[name]) for name in LANGUAGES))

    for name in ("ablation/nll", "ablation/by_layer", "ablation/control"):
        assert both[name].filter(method="feature").equals(alone[name])
        assert len(both[name].filter(method="neuron")) == len(alone[name]) * (2 if name.endswith("layer") else 1)
    nll = both["ablation/nll"].filter(pl.col("control").is_null(), method="neuron", kind="neuron")
    together = {name: {place: [u for p, u in owned[name] if p == place] for place in NEURONS} for name in LANGUAGES}
    for ablated in LANGUAGES:
        for evaluated in LANGUAGES:
            held_out = texts.filter(split="eval", language=evaluated)["text"]
            expected = [one_nll(model, [int(i) for i in text.split()], together[ablated]) for text in held_out]
            cell = nll.filter(ablated=ablated, evaluated=evaluated).row(0, named=True)
            assert cell["tokens"] == sum(count for _, count in expected)
            assert cell["nll"] == pytest.approx(sum(total for total, _ in expected) / cell["tokens"], rel=1e-4)
    alone_at = both["ablation/by_layer"].filter(method="neuron")
    assert alone_at["hookpoint"].unique(maintain_order=True).to_list() == NEURONS


def one_nll(model: Any, ids: list[int], units: dict[str, list[int]]) -> tuple[float, int]:
    """NLL of a text's own tokens (nats) with `units` set to 0 on them, and how many targets there are."""

    def edit(removed: list[int]) -> hookpoints.Edit:
        def change(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[:, 1:, removed] = 0.0
            return x

        return change

    whole = torch.tensor([[1, *ids]])
    with hookpoints.editing(model, {name: edit(removed) for name, removed in units.items()}):
        logits = model(input_ids=whole, use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1], whole[0, 1:], reduction="sum").item(), len(ids)


@pytest.mark.parametrize("name", ["extract", "neurons", "stream"])
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_position_embeddings": 8}, r"corpus\.max_tokens: a text has (9|10) tokens, 1 special .* 8 positions"),
        ({"vocab_size": 60}, r"model\.name: the tokenizer gives the token \d+ .* 0 to 59 only"),
    ],
)
def test_texts_that_do_not_fit_the_model_are_named_before_the_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sizes: dict[str, int], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2} | sizes
    small = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(intermediate_size=24, **options))
    small.eval().requires_grad_(False)
    monkeypatch.setattr(loading, "load_tokenizer", lambda section: tokenizer)
    monkeypatch.setattr(loading, "load_skeleton", lambda section: small)
    monkeypatch.setattr(loading, "load_model", lambda section, dtype: small)
    monkeypatch.setattr(small, "forward", lambda **inputs: pytest.fail("a pass"))
    monkeypatch.setattr(small.model, "forward", lambda **inputs: pytest.fail("a pass"))
    Path("data/corpus").mkdir(parents=True)
    for file in ("texts", "train"):
        corpus().write_parquet(f"data/corpus/{file}.parquet")
    set_params(neurons={"hookpoints": NEURONS}, train={"source": "stream" if name == "stream" else "stored"})
    with pytest.raises(UserError, match=message):
        stage(name)
