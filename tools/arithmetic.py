"""`python tools/arithmetic.py`: estimates the bytes, FLOPs and hours of a run before it starts.

It prints the tables of docs/scaling.md, which has the formulas. The rates were measured on one GPU by
`benchmarks/scale.py` (`benchmarks/results/scale.cuda.json`); all else is calculated.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

RATES = Path(__file__).parent.parent / "benchmarks/results/scale.cuda.json"
TOKENS, DEVICES = {"1 M": 10**6, "100 M": 10**8, "10 B": 10**10}, (1, 8, 64)
PASS, STEP, COUNT = "forward pass, all hookpoints read", "SAE training step", "SAE encode and count"
LENGTH = 128  # tokens of a text


@dataclass(frozen=True)
class Shape:
    """A Llama, and SAEs at the MLP outputs of all its blocks."""

    name: str
    d: int
    inner: int
    blocks: int
    heads: int
    key_heads: int
    latents: int = 131072

    @property
    def forward(self) -> float:
        """FLOPs of the blocks per token: 2 per weight, plus attention to half a text on average."""
        weights = 2 * self.d**2 * (1 + self.key_heads / self.heads) + 3 * self.d * self.inner
        return self.blocks * (2 * weights + 4 * self.d * LENGTH / 2)

    @property
    def encoder(self) -> float:
        """FLOPs of one SAE's scores per token, nearly all of those of a training step or of `encode`."""
        return 2 * self.d * self.latents

    def stored(self, dtype: str) -> float:
        """Bytes of the activations per token at all hookpoints."""
        return self.blocks * (self.d + 4 if dtype == "int8" else 2 * self.d)

    @property
    def state(self) -> float:
        """Bytes of an SAE in training: weights, gradients and Adam's two moments, all float32."""
        return 16 * 2 * self.d * self.latents


SHAPES = [
    Shape("Llama 3.2 1B", 2048, 8192, 16, 32, 8),
    Shape("Llama 3.1 8B", 4096, 14336, 32, 32, 8),
]


def rates(shape: Shape) -> dict[str, float]:
    """Measured tokens/s on one device, by task."""
    records = json.loads(RATES.read_text(encoding="utf-8"))
    return {r["name"]: r["value"] for r in records if r["case"].startswith(shape.name)}


def hours(shape: Shape, tokens: float, devices: int) -> dict[str, float]:
    """Hours of each stage: all devices share a pass; each device trains one SAE at a time."""
    rate, rounds = rates(shape), math.ceil(shape.blocks / devices)
    return {
        "extract": tokens / rate[PASS] / devices / 3600,
        "train": rounds * tokens / rate[STEP] / 3600,
        "encode": rounds * tokens / rate[COUNT] / 3600,
    }


def size(number: float, unit: str) -> str:
    """Three digits and a decimal prefix."""
    prefix, value = next(
        ((p, v) for p, v in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)) if number >= v), ("", 1)
    )
    return f"{number / value:.3g} {prefix}{unit}"


def span(hours: float) -> str:
    """A readable span of time."""
    if hours < 1 / 30:
        return f"{hours * 3600:.0f} s" if hours * 3600 >= 1 else "< 1 s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.0f} h" if hours < 72 else f"{hours / 24:.0f} days"


def row(*cells: object) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def measured() -> list[str]:
    """The rates and the device on which they were measured."""
    lines = [row("a token of", "what", "FLOP", "tokens/s", "TFLOP/s"), "|---|---|---|---|---|"]
    for shape in SHAPES:
        for what, flops in ((PASS, shape.forward), (STEP, shape.encoder), (COUNT, shape.encoder)):
            rate = rates(shape)[what]
            lines.append(row(shape.name, what, size(flops, "").strip(), f"{rate:,}", f"{rate * flops / 1e12:.0f}"))
    return lines


def spans(shape: Shape) -> list[str]:
    """Bytes and hours of one shape."""
    lines = [
        f"**{shape.name}** (d = {shape.d:,}, {shape.blocks} hookpoints, {shape.latents:,} latents). Activations of a "
        f"token: {shape.stored('float16') / 1e3:.0f} kB in float16, {shape.stored('int8') / 1e3:.0f} kB in int8. "
        f"An SAE in training: {size(shape.state, 'B')}.",
        "",
        row("tokens", "GPUs", "float16", "int8", "`extract`", "`train`", "`encode`"),
        "|---|---|---|---|---|---|---|",
    ]
    for name, tokens in TOKENS.items():
        disk = [size(tokens * shape.stored(dtype), "B") for dtype in ("float16", "int8")]
        lines += [row(name, n, *disk, *map(span, hours(shape, tokens, n).values())) for n in DEVICES]
    return lines


def page() -> str:
    """All tables, as they stand in docs/scaling.md."""
    return "\n".join([*measured(), *(line for shape in SHAPES for line in ("", *spans(shape)))])


if __name__ == "__main__":
    print(page())
