"""`python benchmarks/sae_memory.py`: peak memory of training an SAE, above that of the imported libraries.

Each case trains for some steps in a process of its own, as the stage `train` does: activations from memory-mapped
shards, a checkpoint to resume from, the finished SAE written. The peak is the kernel's (VmHWM). It must be at most
1.5 times (weights + optimizer state) + 256 MiB.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import race

CASES = [(576, 4608, 1024), (576, 32768, 1024), (2048, 16384, 2048), (2048, 32768, 2048)]  # d, latents, batch
MIB = 2**20


def child(d: int, latents: int, batch: int) -> None:
    import torch
    from safetensors.torch import save_file

    from babelscope import config
    from babelscope.activations import store
    from babelscope.activations.batches import Batches
    from babelscope.sae import checkpoint
    from babelscope.sae.training.loop import train

    params = config.load()
    rows, steps = 16 * batch, 12
    changes = {"latents": latents, "batch": batch, "tokens": steps * batch, "log_every": 2}
    settings = params.train.model_copy(update=changes)
    hardware = params.hardware.model_copy(update={"checkpoint_seconds": 0})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"activations": torch.randn(rows, d).half()}, folder / store.shard_name(0))
        store.write_index(folder, [rows], d, "float16", "made-up", "layers.0")
        before = race.memory("VmRSS")
        batches = Batches(store.ActivationStore(folder), torch.arange(rows), batch, steps, 0)
        trained = train(batches, settings, hardware, seed=0, folder=folder)
        assert trained is not None
        checkpoint.save(trained[0][0], folder / "out", {"model_name": "made-up", "hook_name": "layers.0"})
        print(race.memory("VmHWM") - before)


def main() -> None:
    records = []
    print(f"{'d':>6}{'latents':>9}{'batch':>7}{'peak':>9}{'bound':>9}  MiB, {race.machine()}")
    for d, latents, batch in CASES:
        command = [sys.executable, __file__, str(d), str(latents), str(batch)]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        state = 3 * 4 * (2 * latents * d + latents + d)  # weights and Adam's two moments, float32
        bound = 1.5 * state + 256 * MIB
        print(f"{d:6}{latents:9}{batch:7}{peak / MIB:9.0f}{bound / MIB:9.0f}", flush=True)
        case = f"d={d} latents={latents} batch={batch}"
        extra = {"ratio_to_state": peak / state, "ratio_to_bound": peak / bound}
        records.append(race.record(case, "babelscope", round(peak / MIB), "MiB", **extra))
    race.write("sae_memory", records)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(*map(int, sys.argv[1:]))
    else:
        main()
