"""`python benchmarks/arithmetic.py`: tokens, bytes, FLOPs and hours of a run before it is started, as docs/scaling.md has them.

The rates are those of `benchmarks/results/scale.cuda.json` (`benchmarks/scale.py`, on one GPU). Everything else is
counted here, by the formulas of that page.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

RATES = Path(__file__).parent / "results/scale.cuda.json"
TOKENS, DEVICES = (10**6, 10**8, 10**10), (1, 8, 64)
LENGTH = 128  # tokens of a text, for attention's share


@dataclass(frozen=True)
class Shape:
    """A Llama and the SAEs at the MLP outputs of all its blocks."""

    name: str
    d: int
    inner: int
    blocks: int
    heads: int
    key_heads: int
    latents: int

    def forward(self) -> float:
        """FLOPs of the blocks on a token: 2 per weight, and attention over half a text on average."""
        projections = 2 * self.d**2 * (1 + self.key_heads / self.heads)
        return self.blocks * (2 * (projections + 3 * self.d * self.inner) + 4 * self.d * LENGTH / 2)

    def step(self) -> float:
        """FLOPs of a training step of one SAE on a token: the product with the encoder; all else is by the k active."""
        return 2 * self.d * self.latents

    def stored(self, dtype: str) -> float:
        """Bytes of a token's activations."""
        return self.blocks * (self.d + 4 if dtype == "int8" else 2 * self.d)

    def state(self) -> float:
        """Bytes of an SAE in training: weights, gradients and Adam's two moments in float32."""
        return 16 * 2 * self.d * self.latents


SHAPES = {
    "Llama 3.2 1B": Shape("Llama 3.2 1B", 2048, 8192, 16, 32, 8, 131072),
    "Llama 3.1 8B": Shape("Llama 3.1 8B", 4096, 14336, 32, 32, 8, 131072),
}


def rates(shape: Shape) -> dict[str, float]:
    """Measured tokens/s on one device, by what is done."""
    records = json.loads(RATES.read_text())
    return {r["name"]: r["value"] for r in records if r["case"].startswith(shape.name)}


def hours(shape: Shape, tokens: float, devices: int) -> dict[str, float]:
    """Wall hours of each stage: passes and counting are divided among all devices, trainings one to a hookpoint."""
    rate = rates(shape)
    rounds = math.ceil(shape.blocks / devices)
    return {
        "extract": tokens / rate["forward pass, all hookpoints read"] / devices / 3600,
        "train": rounds * tokens / rate["SAE training step"] / 3600,
        "encode": rounds * tokens / rate["SAE encode and count"] / 3600,
    }


def size(number: float, unit: str) -> str:
    """Three digits and a decimal prefix."""
    for prefix, value in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= value:
            return f"{number / value:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def time(hours: float) -> str:
    """A readable span of time."""
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:.1f} h" if hours < 100 else f"{hours / 24:.0f} days"


def table() -> str:
    """The tables of the page, in Markdown."""
    lines = []
    for shape in SHAPES.values():
        lines += [
            f"{shape.name}: d = {shape.d:,}, {shape.blocks} hookpoints, {shape.latents:,} latents. A token costs "
            f"{size(shape.forward(), 'FLOP')} in the forward pass and {size(shape.blocks * shape.step(), 'FLOP')} in the "
            f"SAEs' training, and takes {size(shape.stored('float16'), 'B')} in float16, {size(shape.stored('int8'), 'B')} "
            f"in int8; an SAE in training takes {size(shape.state(), 'B')}.",
            "",
            "| tokens | in float16 | in int8 | devices | `extract` | `train` | `encode` |",
            "|---|---|---|---|---|---|---|",
        ]
        for tokens in TOKENS:
            disk = [size(tokens * shape.stored(dtype), "B") for dtype in ("float16", "int8")]
            for devices in DEVICES:
                spans = [time(value) for value in hours(shape, tokens, devices).values()]
                lines.append(
                    "| "
                    + " | ".join([f"{tokens:.0e}".replace("e+0", "e").replace("e+", "e"), *disk, str(devices), *spans])
                    + " |"
                )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
