"""`python tools/stand_in.py FOLDER`: memory and time of every stage at full size, with a random model and SAEs.

It makes two things in FOLDER that would come from a hub: a Llama of the shape of Llama 3.2 1B (16 layers, d = 2048)
with random weights and the embedded model's tokenizer, and a release in the format of EleutherAI/sparsify with 131,072
TopK latents at each of the 16 MLP outputs. The SAEs have the same random weights, hard-linked here and in data/sae: 2
GiB instead of 32, which are also read faster than 32 GiB would be. Then the stages of dvc.yaml run in FOLDER one by
one, without DVC, on a few texts in three languages from the default's corpus. The kernel's peak of every process
(ru_maxrss, memory-mapped files included) is printed and written to FOLDER/stages.json.
The features mean nothing; only their cost does. The full shape needs 8 GiB of disk.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ruamel.yaml import YAML

from babelscope.config import overlay

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ["en", "de", "tr"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--d", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--latents", type=int, default=131_072)
    parser.add_argument("--train-tokens", type=int, default=400, help="per language")
    parser.add_argument("--eval-tokens", type=int, default=60, help="per language")
    parser.add_argument("--only", nargs="+", default=[], help="these stages alone, in a FOLDER that holds the others'")
    args = parser.parse_args()
    folder = args.folder.resolve()
    prepare(folder, args)
    hookpoints = [f"layers.{number}.mlp" for number in range(args.layers)]
    stages = [("sample",), ("extract",)]
    stages += [(stage, name) for name in hookpoints for stage in ("train", "encode")]
    stages += [(name,) for name in ("neurons", "extend", "score", "quality", "identify", "ablate", "steer", "browse")]
    results = folder / "stages.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    for stage in stages:
        if args.only and stage[0] not in args.only:
            continue
        if stage[0] == "train" and not (folder / "release").exists():
            apart(release, folder, hookpoints, args.latents)
        found[" ".join(stage)] = measure(folder, stage)
        if stage[0] == "train":
            link(folder / "data/sae" / hookpoints[0], folder / "data/sae" / stage[1])
        results.write_text(json.dumps(found, indent=2) + "\n")


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """The code, the params and the model."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("src", "stages"):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    if not (folder / "model").exists():
        apart(model, folder / "model", args.d, args.layers)
    yaml = YAML()
    default = yaml.load(ROOT / "params.yaml")
    params = overlay.merge(default, yaml.load(ROOT / "experiments" / "llama-3.2-1b.yaml"))
    params["model"] = {
        **default["model"],
        "source": "huggingface",
        "name": str(folder / "model"),
        "gguf_file": None,
        "sha256": None,
    }
    params["corpus"] = {**default["corpus"], "train_tokens": args.train_tokens, "eval_tokens": args.eval_tokens}
    # All texts have the same length: few texts of different lengths would give a batch each.
    params["corpus"] |= {"min_characters": 80, "max_tokens": 16}
    params["languages"] = LANGUAGES
    params["hookpoints"] = [f"layers.{number}.mlp" for number in range(args.layers)]
    params["pretrained"] = {"name": str(folder / "release"), "revision": None, "folder": "{hookpoint}"}
    params["neurons"]["hookpoints"] = [f"layers.{number}.mlp.act_fn" for number in range(args.layers)]
    # Random latents belong to no language; these limits select some of them.
    params["score"] |= {"example_rate": 0.04, "token_rate": 0.01}
    params["quality"]["tokens"] = 30
    params["identify"]["also"] = None
    params["ablate"] |= {"methods": ["additive", "neuron", "feature"], "control_draws": 1, "by_layer": False}
    params["ablate"]["bootstrap"] = 100
    params["steer"] |= {"hookpoints": [], "strengths": [2.0], "prompts": 2, "new_tokens": 4}
    params["browse"] |= {"shared": 20}
    yaml.dump(params, folder / "params.yaml")


def apart(function: Callable[..., None], *args: object) -> None:
    """Call it in a process of its own: memory of this process would count in the peaks of its children."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


def model(folder: Path, d: int, layers: int) -> None:
    """A Llama with random weights; at d = 2048 and 16 layers, all but the vocabulary is as large as in Llama 3.2 1B."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from babelscope import config
    from babelscope.models import loading

    tokenizer = loading.load_tokenizer(config.load(ROOT / "params.yaml").model)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=d, intermediate_size=4 * d, num_hidden_layers=layers,
        num_attention_heads=max(1, d // 64), num_key_value_heads=max(1, d // 256), tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(shape).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    tokenizer.save_pretrained(folder)


def release(folder: Path, hookpoints: list[str], latents: int) -> None:
    """One random SAE for all hookpoints; its encoder ignores their mean activations, which would use up k."""
    import torch
    from safetensors.torch import save_file

    from babelscope.activations.store import ActivationStore

    stores = [ActivationStore(folder / "data/activations" / name) for name in hookpoints]
    sums = [
        sum(store.gather(rows).double().sum(0) for rows in torch.arange(store.rows).split(8192)) for store in stores
    ]
    basis = torch.linalg.qr(torch.stack(sums).T)[0].float()
    d = len(basis)
    generator = torch.Generator().manual_seed(0)
    encoder = torch.empty(latents, d)
    for rows in encoder.split(8192):
        rows.normal_(generator=generator)
        rows -= rows @ basis @ basis.T
        rows /= rows.norm(dim=1, keepdim=True)
    weights = {"encoder.weight": encoder, "encoder.bias": torch.zeros(latents), "W_dec": encoder.clone()}
    weights["b_dec"] = torch.zeros(d)
    settings = {"activation": "topk", "k": 32, "num_latents": latents, "d_in": d, "expansion_factor": latents // d,
                "normalize_decoder": True, "skip_connection": False, "transcode": False}  # fmt: skip
    first = folder / "release" / hookpoints[0] / "sae.safetensors"
    for name in hookpoints:
        place = folder / "release" / name
        place.mkdir(parents=True)
        (place / "cfg.json").write_text(json.dumps(settings))
        if name == hookpoints[0]:
            save_file(weights, first)
        else:
            os.link(first, place / "sae.safetensors")


def link(first: Path, other: Path) -> None:
    """Hard-link the weights of the first folder: one file on the disk and in the page cache."""
    if other != first:
        (other / "sae_weights.safetensors").unlink()
        os.link(first / "sae_weights.safetensors", other / "sae_weights.safetensors")


def measure(folder: Path, stage: tuple[str, ...]) -> dict[str, float]:
    """Run one stage; returns its peak resident memory (GiB), its time and its CPU time (seconds)."""
    command = [sys.executable, f"stages/{stage[0]}.py", *stage[1:]]
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, env=os.environ | {"PYTHONPATH": "src"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(stage)}: exit code {process.returncode}")
    record = {
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    }
    print(" ".join(stage), record, flush=True)
    return record


if __name__ == "__main__":
    main()
