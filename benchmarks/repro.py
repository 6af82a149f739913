"""`python benchmarks/repro.py`: the whole pipeline of params.yaml against one bare forward pass over its corpus.

`dvc repro` runs in a fresh clone of the last commit, all stages with their start-ups, between two forward passes over
the same texts: the default's batches to its deepest hookpoint, in the same precision, nothing stored. The model is
unpacked before (`make repro` does it once per machine). With a folder as argument, the clone is kept there. The goal on
2 cores: at most 4 times a pass, and never above 10 minutes.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
import race
import torch

from babelscope import config
from babelscope.models import hardware, hookpoints, loading, tokens
from extract import cut

ROOT = Path(__file__).parent.parent
OURS, BARE = "dvc repro", "bare forward pass"


def forward(folder: Path) -> float:
    """Seconds of a forward pass over the corpus in `folder`."""
    params = config.load(folder / "params.yaml")
    device = hardware.prepare(params.hardware)
    corpus, tokenizer = pl.read_parquet(folder / "data/corpus/texts.parquet"), loading.load_tokenizer(params.model)
    texts = tokens.tokenize_corpus(tokenizer, corpus, params.corpus.max_tokens)
    batches = [tokens.pad(texts[batch])[0].to(device) for batch in texts.batches(params.extract.batch_tokens)]
    model = loading.load_model(params.model, params.extract.dtype)
    body = cut(model, 1 + max(hookpoints.layer_of(name) for name in params.hookpoints)).to(device)
    with torch.inference_mode():
        body(input_ids=batches[0], use_cache=False)
        start = time.perf_counter()
        for ids in batches:
            last = body(input_ids=ids, use_cache=False).last_hidden_state
        last[0, 0, 0].item()  # a GPU works asynchronously
        return time.perf_counter() - start


def repro(folder: Path, *targets: str) -> dict[str, float]:
    """Seconds of every stage that `dvc repro` runs in `folder`, start-ups included, and of the command ("all")."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": "src", "HF_HUB_OFFLINE": "1", "DVC_NO_ANALYTICS": "1"}
    start, name, seconds = time.perf_counter(), "dvc", {}
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", *targets], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    last, shown = start, []
    for line in process.stdout or ():
        shown.append(line)
        if found := re.match(r"Running stage '(\w+)", line):
            now = time.perf_counter()
            seconds[name] = seconds.get(name, 0.0) + now - last
            name, last = found[1], now
    if process.wait():
        sys.exit("".join(shown[-20:]))
    end = time.perf_counter()
    return seconds | {name: seconds.get(name, 0.0) + end - last, "all": end - start}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else name) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        first = repro(folder, "sample")  # the texts of both
        before = forward(folder)
        rest = repro(folder)
        after = forward(folder)
        params = config.load(folder / "params.yaml")
    rest["sample"] = first["sample"]
    total, bare = rest.pop("all") + first["all"], statistics.mean([before, after])
    case = f"{params.model.name}, {len(params.languages)} languages, {len(params.hookpoints)} hookpoints"
    print(f"{case}, {race.machine()}")
    for stage, seconds in rest.items():
        print(f"{stage:12}{seconds:8.1f} s")
    print(f"{OURS:20}{total:8.1f} s\n{BARE:20}{bare:8.1f} s (before {before:.1f}, after {after:.1f})")
    print(f"{total / bare:.2f} times the bare forward pass")
    race.write("repro", [
        race.record(case, OURS, round(total, 1), "s", ratio_to_floor=total / bare),
        race.record(case, BARE, round(bare, 1), "s"),
        *(race.record(case, f"stage {stage}", round(seconds, 1), "s", ratio_to_floor=seconds / bare)
          for stage, seconds in rest.items()),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
