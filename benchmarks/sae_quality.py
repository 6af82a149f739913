"""FVU at equal tokens: `babelscope.sae` with the settings of params.yaml, against peers at their best learning rates.

All train on the activations of the default run (`dvc repro extract`): the same rows in the same order, scaled to a
mean squared norm of d, the same k, latents and tokens. All are measured by `babelscope.sae.metrics`, on the held-out
rows, on babelscope SAEs with the peers' weights: all are TopK SAEs with a ReLU, so that the mapping is exact. The
settings of each peer are in `benchmarks/peers/`. Its learning rate is doubled and halved until the best has a rate
on either side. Results are kept under `.bench/quality/`, so that a killed sweep resumes.

`python benchmarks/sae_quality.py` runs everything and writes results; with any argument it writes none.

It reads the outputs of `make experiment NAME=smollm2-135m`; its figures in docs/ are of that model.
"""

import argparse
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import race
import torch
from peers.process import Peer
from peers.worker import Case, Run
from safetensors.torch import load_file, save_file
from torch import Tensor

from babelscope import config
from babelscope.activations.batches import Batches
from babelscope.activations.store import ActivationStore
from babelscope.config import schema
from babelscope.core.files import read_json, write_atomically, write_json
from babelscope.core.fingerprint import dvc_md5
from babelscope.sae.autoencoder import SAE
from babelscope.sae.metrics import quality
from babelscope.sae.training.schedule import learning_rate

HOOKPOINTS = ("layers.14.mlp", "layers.26.mlp")
# Peers and their variants, and the learning rate at which the search starts.
RACERS = {
    ("sae-lens", "default"): 0.004,
    ("eai-sparsify", "adam"): 0.004,
    ("eai-sparsify", "signum"): 0.004,
    ("dictionary-learning", "default"): 0.002,
    ("dictionary-learning", "unit norm"): 0.002,
}
OURS = "babelscope"
# Number of rates to try on either side of the best, each twice the last.
REACH = 1
# Tokens without a firing after which a peer counts a latent as dead: less than a third of the run.
DEAD_AFTER = 100_000
ACTIVATIONS, SCRATCH = Path("data/activations"), Path(".bench/quality")


class Figures(NamedTuple):
    """Results on the held-out rows."""

    fvu: float
    l0: float
    dead_share: float


class Data:
    """The activations of one hookpoint: the training batches and the held-out rows."""

    def __init__(self, hookpoint: str, params: config.Config, train: schema.Train) -> None:
        self.hookpoint, self.store = hookpoint, ActivationStore(ACTIVATIONS / hookpoint)
        table = pl.read_parquet(ACTIVATIONS / "tokens.parquet")
        rows = {split: table.filter(pl.col("split") == split)["row"].to_torch() for split in ("train", "eval")}
        self.held_out = rows["eval"]
        self.batches = Batches(self.store, rows["train"], train.batch, -(-train.tokens // train.batch), params.seed)
        [(moments, _)] = self.batches.moments()
        self.scale = moments.scale

    @contextmanager
    def file(self) -> Iterator[tuple[Path, list[str]]]:
        """A temporary file of the training rows in their order, [tokens, d], and hashes of all data."""
        path = SCRATCH / f"{self.hookpoint}.safetensors"
        write_atomically(
            path, lambda p: save_file({"activations": torch.cat([pair.x for [pair] in self.batches.read()])}, p)
        )
        try:
            yield path, [dvc_md5(p) for p in (path, ACTIVATIONS / self.hookpoint, ACTIVATIONS / "tokens.parquet")]
        finally:
            path.unlink()

    def measure(self, sae: SAE) -> Figures:
        """Figures of an SAE in the units of the store."""
        found = quality(sae, self.store, self.held_out, torch.zeros(len(self.held_out), dtype=torch.int64), 1)
        return Figures(found.fvu, found.l0, found.dead_share)


def measure_peer(peer: Peer, case: Case, data: Data, rows: Path, hashes: list[str], run: Run) -> Figures:
    """Train and measure a peer, or read its known figures."""
    scripts = [Path(__file__).parent / "peers" / name for name in ("worker.py", f"{peer.name}.py", f"{peer.name}.txt")]
    key = json.dumps([hashes, case, run, *(script.read_text(encoding="utf-8") for script in scripts)])
    known = SCRATCH / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if not known.exists():
        with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
            weights = f"{folder}/weights.safetensors"
            request = {"case": case, "train": run, "data": str(rows.absolute()), "scale": data.scale}
            versions = peer.ask(request | {"weights": weights})["versions"]
            figures = data.measure(in_raw_units(load_file(weights), data.scale, case.k))
        found = {name: value if math.isfinite(value) else None for name, value in figures._asdict().items()}
        write_json(known, {**found, "versions": versions, "peer": peer.name, "run": run, "hookpoint": data.hookpoint})
    found = read_json(known)
    peer.versions = found["versions"]
    return Figures(*(math.inf if found[name] is None else found[name] for name in Figures._fields))


def in_raw_units(weights: dict[str, Tensor], scale: float, k: int) -> SAE:
    """A babelscope SAE with a peer's weights, which were trained on activations times `scale`."""
    return SAE(weights["encoder"], weights["W_dec"], weights["b_enc"] / scale, weights["b_dec"] / scale, k)


def sweep(measure: Callable[[Run], Figures], start: Run) -> dict[float, Figures]:
    """Measure at rates 2^i times that of `start` until the best has `REACH` on either side; by rate, in order."""
    found: dict[float, Figures] = {}
    best = start.learning_rate
    while missing := [r for i in range(1 + REACH) for r in (best / 2**i, best * 2**i) if r not in found]:
        figures = found[missing[0]] = measure(start._replace(learning_rate=missing[0]))
        best = min(found, key=lambda rate: found[rate].fvu)
        print(f"  {missing[0]:.3g}: FVU {figures.fvu:.4f}, dead {figures.dead_share:.3f}", flush=True)
    return dict(sorted(found.items()))


def ours(data: Data, params: config.Config, train: schema.Train) -> Figures:
    """Train and measure babelscope's SAE as the stage `train` does."""
    from babelscope.sae.training import loop  # imports Lightning, which a table of known figures does not need

    with tempfile.TemporaryDirectory() as folder:
        trained = loop.train(data.batches, train, params.hardware, seed=params.seed, folder=Path(folder))
    assert trained is not None
    [(sae, _)] = trained
    return data.measure(sae)


def show(hookpoint: str, sweeps: dict[str, dict[float, Figures]]) -> None:
    """Print the table of one hookpoint; the best of every sweep is starred."""
    print(f"\n{hookpoint}\n{'':32}{'rate':>10}{'FVU':>9}{'L0':>7}{'dead':>8}")
    for name, figures in sweeps.items():
        best = min(figures, key=lambda rate: figures[rate].fvu)
        for rate, found in figures.items():
            star = "*" if rate == best else ""
            print(f"{name:32}{rate:10.3g}{found.fvu:8.4f}{star:1}{found.l0:7.2f}{found.dead_share:8.2%}")


def records(
    case: str, tokens: int, sweeps: dict[str, dict[float, Figures]], versions: dict[str, str]
) -> list[dict[str, Any]]:
    """One record for every rate; `best` marks a competitor's best rate, which `ratio_to_best_peer` compares."""
    least = {name: min(found.fvu for found in figures.values()) for name, figures in sweeps.items()}
    peer = min(fvu for name, fvu in least.items() if name != OURS)
    own = {"ratio_to_best_peer": least[OURS] / peer}
    return [
        race.record(case, name, round(found.fvu, 5), "FVU", **(own if name == OURS else {}))
        | {"learning_rate": rate, "l0": round(found.l0, 3), "dead_share": round(found.dead_share, 5)}
        | {"tokens": tokens, "best": found.fvu == least[name], "versions": versions}
        for name, figures in sweeps.items()
        for rate, found in figures.items()
        if math.isfinite(found.fvu)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the quality of TopK SAEs at equal tokens.")
    parser.add_argument("--hookpoints", nargs="*", default=HOOKPOINTS)
    parser.add_argument("--peers", nargs="*", default=sorted({name for name, _ in RACERS}), help="none: ours alone")
    parser.add_argument("--variants", nargs="*", help="of those peers; all by default")
    parser.add_argument("--tokens", type=int, help="instead of train.tokens")
    parser.add_argument("--peer-batch", type=int, help="rows of the peers' batches, instead of train.batch")
    parser.add_argument("--without-ours", action="store_true")
    arguments = parser.parse_args()
    params = config.load()
    train = params.train.model_copy(update={"tokens": arguments.tokens or params.train.tokens})
    peers = {name: Peer(name) for name in arguments.peers}
    results: list[dict[str, Any]] = []
    print(race.machine())
    for hookpoint in arguments.hookpoints:
        data = Data(hookpoint, params, train)
        case = Case(data.store.d, train.latents, arguments.peer_batch or train.batch, train.k)
        sweeps: dict[str, dict[float, Figures]] = {}
        if not arguments.without_ours:
            rate = train.learning_rate or learning_rate(train.latents, data.batches.steps)
            sweeps[OURS] = {rate: ours(data, params, train)}
        tokens = data.batches.steps * data.batches.size
        with data.file() as (rows, hashes):
            for (name, variant), start in RACERS.items():
                if name in peers and (not arguments.variants or variant in arguments.variants):
                    print(f"{hookpoint} {name} {variant} {case}", flush=True)
                    run = Run(tokens // case.batch, start, DEAD_AFTER, variant)
                    measure = partial(measure_peer, peers[name], case, data, rows, hashes)
                    sweeps[f"{name} {variant}"] = sweep(measure, run)
        show(hookpoint, sweeps)
        if OURS in sweeps and len(sweeps) > 1:
            versions = {key: value for peer in peers.values() for key, value in peer.versions.items()}
            results += records(f"{hookpoint} {case}", tokens, sweeps, versions)
    for peer in peers.values():
        peer.close()
    if vars(arguments) == vars(parser.parse_args([])):
        race.write("sae_quality", results)


if __name__ == "__main__":
    main()
