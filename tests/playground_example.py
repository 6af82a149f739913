"""A folder in which a small pipeline has run up to `browse`, with planted features, for the tests of the commands."""

import json
import os
from pathlib import Path
from typing import Any

import stand_ins
from closure import ROOT
from pipeline import changed
from test_neurons_stages import stage

from babelscope import config

LANGUAGES, HOOKPOINTS = ["en", "tr", "ja"], ["layers.1.mlp", "layers.2.mlp"]
CHANGES = {
    "languages": LANGUAGES, "hookpoints": HOOKPOINTS, "model.source": "huggingface", "model.gguf_file": None,
    "model.sha256": None, "corpus.source": "files", "corpus.packages": [], "corpus.max_tokens": 24,
    "corpus.train_tokens": 700, "corpus.eval_tokens": 250, "extract.dtype": "float32", "extract.batch_tokens": 1024,
    "train.source": "pretrained", "train.latents": 64, "stability.hookpoints": [], "browse.shared": 20,
    "browse.texts": 2, "steer.new_tokens": 8, "steer.temperature": 0.0, "steer.hookpoints": [],
    "steer.prompt_languages": ["en"], "hardware.accelerator": "cpu",
}  # fmt: skip


def build(folder: Path) -> dict[str, Any]:
    """Run the stages in `folder`, the working directory; returns the params."""
    model = stand_ins.model(folder / "model", "llama", 4)
    saes = stand_ins.planted(model, HOOKPOINTS, LANGUAGES)
    changes = CHANGES | {
        "model.name": str(model), "pretrained.name": str(stand_ins.sparsify_release(folder / "release", saes)),
        "corpus.path": str(stand_ins.text_files(folder / "texts", LANGUAGES, 90)),
    }  # fmt: skip
    params = changed(config.read_yaml(ROOT / "params.yaml"), changes)
    (folder / "params.yaml").write_text(json.dumps(params, ensure_ascii=False))
    os.environ.pop("DVC_ROOT", None)
    for name in ("sample", "extract", *(f"{name} {at}" for name in ("train", "encode") for at in HOOKPOINTS),
                 "extend", "score", "browse"):  # fmt: skip
        stage(*name.split())
    return params
