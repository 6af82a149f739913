"""Knobs that neither the default nor an experiment sets, a few at once, from `sample` to `track`."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import stand_ins
from closure import ROOT
from pipeline import Pipeline, changed
from test_explain import Server, server  # noqa: F401

from babelscope import config, sae

SMALL = {
    "languages": ["en", "de", "ru", "ja", "tr"], "model.source": "huggingface", "model.gguf_file": None,
    "model.sha256": None,
    "corpus.source": "huggingface", "corpus.min_characters": 20, "corpus.max_tokens": 24,
    "corpus.train_tokens": 700, "corpus.eval_tokens": 200, "extract.batch_tokens": 512,
    "train.latents": 128, "train.k": 8, "train.tokens": 8192, "train.batch": 256, "stability.hookpoints": [],
    "encode.chunk_tokens": 512, "quality.tokens": 100, "ablate.batch_tokens": 512, "ablate.bootstrap": 30,
    "ablate.control_draws": 2, "steer.hookpoints": [],
    "steer.methods": ["diffmean", "features", "prompt"], "steer.strengths": [2.0], "steer.prompts": 2,
    "steer.new_tokens": 6, "steer.prompt_languages": ["en"],
    "hardware.accelerator": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline(tmp_path_factory.mktemp("knobs"))


def params(folder: Path, family: str, blocks: int, datasets: list[str], **changes: Any) -> dict[str, Any]:
    """The default's params with a stand-in model and these data sets; `__` stands for a dot in a key."""
    model = stand_ins.model(folder / "model", family, blocks)
    sections = [{"name": name, "path": str(stand_ins.DATASETS[name](folder / name, 60))} for name in datasets]
    own = {key.replace("__", "."): value for key, value in changes.items()}
    default = config.read_yaml(ROOT / "params.yaml")
    return changed(default, {**SMALL, "model.name": str(model), "corpus.datasets": sections, **own})


def test_streaming_with_nested_widths_and_a_language_that_fasttext_does_not_know(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    languages = ["en", "zu", "ru", "ja"]
    numbers = pipeline.run(params(
        tmp_path, "llama", 3, [],
        languages=languages, hookpoints=["layers.0.mlp", "layers.1", "layers.1.self_attn", "layers.2.mlp"],
        corpus__source="files", corpus__path=str(stand_ins.text_files(tmp_path / "texts", languages, 70)),
        extract__dtype="float32", extract__store_dtype="bfloat16",
        train__source="stream", train__activation="batchtopk", train__matryoshka=[16, 64], train__learning_rate=None,
        train__transcode=True,
        score__order="probability", score__top=3, score__per_layer=True, score__example_rate=0.5,
        neurons__hookpoints=["layers.0.mlp.act_fn", "layers.2.mlp.act_fn"], neurons__top_rate=0.2,
        identify__also=str(stand_ins.text_files(tmp_path / "others", languages, 8)), identify__also_texts=5,
        ablate__methods=["directional", "neuron"], ablate__control_draws=0, browse__shared=None,
        steer__methods=["pca", "probe", "neurons", "sae-diffmean", "features-2"],
    ))  # fmt: skip
    features = pipeline.table("scores/features").filter(kind="sae")
    ranks = features.group_by("layer", "language").agg(pl.col("rank").sort())["rank"].to_list()
    assert max(map(len, ranks)) == 3 and all(found == list(range(1, len(found) + 1)) for found in ranks)
    baseline = pipeline.table("identify/predictions").filter(method="fasttext")
    assert "zu" not in set(baseline["predicted"])
    assert "zu" not in set(pipeline.table("steer/generations")["language"].drop_nulls())
    assert {"neuron-count", "sae-count"} <= set(pipeline.table("identify/also")["method"])
    assert 0 < numbers["train.layers.1/fvu"] < 1


def test_transcoders_from_activations_in_int8_on_one_language_more_and_one_less(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    hookpoints = ["layers.0.mlp", "layers.2.mlp"]
    numbers = pipeline.run(params(
        tmp_path, "gpt_neox", 3, ["tatoeba", "fineweb-2"], languages=["de", "ru", "ja", "tr"], hookpoints=hookpoints,
        extract__store_dtype="int8", train__activation="jumprelu", train__transcode=True, train__dead_after=2000,
        stability__hookpoints=hookpoints, stability__seeds=[5, 6], stability__cosine=0.5,
        score__members=2, score__same_language=True, score__random_tokens=60,
        neurons__hookpoints=["layers.1.mlp.act"], neurons__top_rate=0.2,
        ablate__methods=["additive", "neuron", "directional"], ablate__dtype="bfloat16", ablate__others_tokens=30,
        steer__prompt_languages=["de", "ru"], steer__temperature=0.0, steer__dtype="bfloat16", quality__tokens=None,
        corpus__lid=0.9, corpus__train_languages=["es", "ja", "ru", "de"],
    ))  # fmt: skip
    for name in hookpoints:
        assert {key.rpartition("/")[2] for key in numbers if key.startswith(f"train.{name}/fvu/")} == {
            "es", "ja", "ru", "de"
        }  # fmt: skip
        assert [key for key in numbers if key.startswith(f"extend/added_fvu/{name}/")] == [
            f"extend/added_fvu/{name}/tr"
        ]
    assert pipeline.table("activations/tokens")["language"].unique().sort().to_list() == ["de", "es", "ja", "ru"]
    assert set(pipeline.table("extended/tokens")["language"]) == {"tr"}
    assert all(sae.load(pipeline.folder / "data/sae", name).b_in is not None for name in hookpoints)
    assert set(pipeline.table("scores/features").filter(kind="sae")["members"]) <= {2}
    assert set(pipeline.table("stability/again")["seed"]) <= {5, 6} and numbers["score/features_on_random_tokens"] >= 0


def test_relu_latents_in_words(pipeline: Pipeline, tmp_path: Path, server: Server) -> None:  # noqa: F811
    numbers = pipeline.run(params(
        tmp_path, "qwen3", 2, ["wikipedia"], hookpoints=["layers.0", "layers.1.mlp"],
        extract__store_dtype="float16", train__activation="relu", ablate__methods=["swap", "feature", "mean"],
        ablate__by_layer=False, ablate__rank_tokens=20, ablate__script_draws=3, ablate__kl_every=1,
        browse__ablation_texts=0, identify__also={"name": "wili-2018",
            "path": str(stand_ins.wili_2018(tmp_path / "wili", 8))}, identify__also_texts=3,
        explain__endpoint=server.url, explain__model="m", explain__per_language=2, explain__examples=2,
        explain__scored=2, score__example_rate=0.2, score__token_rate=0.05,
    ))  # fmt: skip
    control = pipeline.table("ablation/control_script")
    assert control.group_by("method", maintain_order=True).agg("language").rows() == [
        (method, ["en", "de", "tr"]) for method in ("swap", "feature", "mean")
    ]
    for name in ("en", "de", "tr"):
        assert (
            control.filter(method="feature", language=name)["control"].item()
            == (numbers[f"ablate/dnll_control_script/{name}"])
        )
    for name in ("en", "de", "ru", "ja", "tr"):
        assert numbers[f"ablate/kl_own/{name}"] >= 0 and numbers[f"ablate/mean/kl_others/{name}"] >= 0
    table = pipeline.table("explain/explanations")
    assert len(table) == numbers["explain/features"] > 0
    assert table["explanation"].str.starts_with("the <b>token</b>").all()


def test_released_transcoders_of_gemma(pipeline: Pipeline, tmp_path: Path) -> None:
    hookpoints = [f"layers.{layer}.mlp" for layer in range(3)]
    knobs = params(
        tmp_path, "gemma2", 3, ["flores-plus"], hookpoints=hookpoints, train__source="pretrained",
        train__transcode=True, pretrained__folder="layer_{layer}/width_48", ablate__methods=["neuron"],
        neurons__hookpoints=["layers.0.mlp.act_fn", "layers.2.mlp.act_fn"], neurons__top_rate=0.2,
        extract__store_dtype="bfloat16", switching__groups=2,
    )  # fmt: skip
    saes = stand_ins.planted(tmp_path / "model", hookpoints, knobs["languages"], at_input=True)
    folders = {name: f"layer_{layer}/width_48" for layer, name in enumerate(hookpoints)}
    release = stand_ins.saelens_transcoders(tmp_path / "release", saes, folders)
    pipeline.run(changed(knobs, {"pretrained.name": str(release)}))
    assert pipeline.planted_owners(knobs) > 0
    # Transcoders read the input of a module, from which nothing is removed.
    assert pipeline.table("switching/pairs").is_empty() and len(pipeline.table("switching/positions"))


def test_a_pipeline_that_finds_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    numbers = pipeline.run(params(
        tmp_path, "llama", 2, ["paws-x"], languages=["en", "de", "ja"], hookpoints=["layers.0.mlp", "layers.1.mlp"],
        stability__hookpoints=["layers.1.mlp"], train__activation="batchtopk", train__matryoshka=[32],
        extract__dtype="float16", score__example_rate=1.0, score__token_rate=1.0, browse__shared=0,
        ablate__methods=["feature", "additive", "directional"],
    ))  # fmt: skip
    assert numbers["score/features"] == 0 and pipeline.table("scores/features").is_empty()
    assert numbers["ablate/own"] == numbers["ablate/additive/own"] == 0
    assert set(pipeline.table("identify/predictions")["method"]) == {"fasttext"}
