"""`python tools/soak.py`: watch the memory of every stage in a long run (40 minutes on two cores).

It runs the real pipeline on the embedded model at a medium size, in a clone. Twice a second it records the anonymous
memory of a stage's processes (mapped files belong to the page cache). Growth compares the median of the last fifth of a
phase's time with the median of the fifth that begins after 40 % of it. A phase is the work that a stage's progress
names; ablation by two methods has two phases.

Batches come in the order of text length, and longer texts take more memory. So all texts here are equally long:
messages of the default's catalogs, joined.
"""

import argparse
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import psutil
from clone import clone, run, set_params
from closure import ROOT
from kills import follow, repro

from babelscope import config
from babelscope.corpus import gettext_catalogs
from babelscope.models.loading import load_tokenizer

MEDIUM = {
    "languages": ["en", "de", "fr", "ru", "tr", "ja", "he", "fi"],
    "hookpoints": ["layers.14.mlp", "layers.26.mlp"],
    "corpus.source": "files",
    "corpus.path": "texts",
    "corpus.packages": [],
    "corpus.max_tokens": 64,
    "corpus.train_tokens": 32000,
    "corpus.eval_tokens": 4000,
    "train.latents": 4608,
    "train.k": 32,
    "train.tokens": 6_000_000,
    "train.batch": 1024,
    "hardware.checkpoint_seconds": 5,
    "quality.tokens": None,
    "stability.hookpoints": ["layers.26.mlp"],
    "neurons.hookpoints": ["layers.14.mlp.act_fn", "layers.26.mlp.act_fn"],
    "ablate.methods": ["feature", "neuron"],
    "ablate.bootstrap": 1000,
    "ablate.control_draws": 5,
    "steer.strengths": [1.0, 2.0, 3.0],
    "steer.prompts": 60,
    "steer.new_tokens": 24,
    "browse.texts": 3,
    "browse.tokens": 8,
    "browse.ablation_texts": 16,
    "browse.shared": 2000,
}
MIB = 2**20
# Shorter phases end before they are warm.
LONG = 60.0
# Seconds from the beginning of a phase to its first line; until then its samples count as the previous phase's.
LATE = 15.0


def long_texts(folder: Path, longest: int, wanted: int) -> None:
    """Write texts of at least `longest` tokens, `wanted` tokens in each language, to `folder/<language>.txt`."""
    params = config.load(ROOT / "params.yaml")
    messages = gettext_catalogs.read(params.corpus, MEDIUM["languages"])
    tokenizer, draw = load_tokenizer(params.model), random.Random(0)
    folder.mkdir()
    for language in MEDIUM["languages"]:
        have = messages.filter(language=language)["text"].to_list()
        counts = [len(ids) for ids in tokenizer(have, add_special_tokens=False)["input_ids"]]
        texts = []
        while len(texts) * longest < wanted:
            some, tokens = [], 0
            while tokens < 1.2 * longest:  # joined words may give other tokens
                number = draw.randrange(len(have))
                some.append(have[number])
                tokens += counts[number]
            texts.append(" ".join(some))
        (folder / f"{language}.txt").write_text("\n".join(texts), encoding="utf-8")


def phase(stage: str, log: str) -> str:
    """The current phase of a stage, from its lines of progress."""
    told = re.findall(r"^(.+): \d+ of \d+ ", log[log.rindex(f"Running stage '{stage}'") :], re.MULTILINE)
    return f"{stage}: {told[-1]}" if told and told[-1] != stage.partition("@")[0] else stage


def anonymous(process: subprocess.Popen[bytes]) -> int:
    """Bytes of anonymous memory in the processes below DVC's."""
    total = 0
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))
    return total


def growth(samples: list[int]) -> tuple[float, float]:
    """Median after warm-up and at the end."""
    n = len(samples)
    if n < 5:
        return samples[-1], samples[-1]
    return statistics.median(samples[2 * n // 5 : 3 * n // 5]), statistics.median(samples[4 * n // 5 :])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where the clone is made; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)) / "soak"
        folder.mkdir(parents=True)
        clone(folder)
        set_params(folder, MEDIUM)
        tokens = MEDIUM["corpus.train_tokens"] + MEDIUM["corpus.eval_tokens"]
        long_texts(folder / "texts", MEDIUM["corpus.max_tokens"], 2 * tokens)
        run(folder, "git", "commit", "-qam", "medium")
        log, samples, start = folder.with_suffix(".log"), dict[str, list[tuple[float, int]]](), time.monotonic()
        process = repro(folder, log)
        for begun in follow(process, log):
            if begun and (memory := anonymous(process)):
                doing = phase(begun[-1], log.read_text(errors="replace"))
                samples.setdefault(doing, []).append((time.monotonic(), memory))
            time.sleep(0.5)
        assert process.returncode == 0, log.read_text()
    print(f"{'stage, phase':44}{'seconds':>8}{'warm MiB':>10}{'end MiB':>10}{'peak MiB':>10}{'growth':>8}")
    leaks = []
    for name, all_taken in samples.items():
        last = all_taken[-1][0]
        taken = [one for one in all_taken if one[0] < last - LATE] or all_taken
        seconds = taken[-1][0] - taken[0][0]
        warm, end = growth([memory for _, memory in taken])
        peak = max(memory for _, memory in taken)
        print(f"{name:44}{seconds:8.0f}{warm / MIB:10.0f}{end / MIB:10.0f}{peak / MIB:10.0f}{end / warm - 1:8.1%}")
        if seconds >= LONG and end > 1.05 * warm:
            leaks.append(name)
    print(f"{(time.monotonic() - start) / 60:.0f} minutes; grew by more than 5 %: {', '.join(leaks) or 'none'}")
    return 1 if leaks else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main())
