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
# Rows of a training batch, rows of a block of `stream`, tokens of one of its passes.
BATCH, BLOCK, PASS_TOKENS = 8192, 16 * 8192, 4096


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
    def weights(self) -> float:
        """Weights of the blocks."""
        return self.blocks * (2 * self.d**2 * (1 + self.key_heads / self.heads) + 3 * self.d * self.inner)

    @property
    def forward(self) -> float:
        """FLOPs of the blocks per token: 2 per weight, plus attention to half a text on average."""
        return 2 * self.weights + self.blocks * 4 * self.d * LENGTH / 2

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


def divided(shape: Shape, devices: int) -> dict[str, float]:
    """Stage `stream` if each device trains different SAEs: bytes of a device, bytes that it sends, tokens/s of all.

    The bytes sent are per token of the corpus: a device computes 1 / devices of the passes, and sends each other device
    what that one reads. Gradients that all devices share (DDP) are sent nearly twice per batch (a ring).
    """
    rate, each, others = rates(shape), math.ceil(shape.blocks / devices), (devices - 1) / devices
    width, training = shape.blocks * shape.d, each / rate[STEP]
    return {
        "each": each,
        "memory": each * shape.state
        + 2 * shape.weights
        + 2 * each * shape.d * (BLOCK + 4 * BATCH)
        + 20 * width * PASS_TOKENS,
        "sent": 2 * width * others / devices,
        "gradients": 2 * others * shape.blocks * shape.state / 4 / BATCH,
        "repeated": 1 / (1 / rate[PASS] + training),
        "divided": 1 / (1 / rate[PASS] / devices + training),
    }


def size(number: float, unit: str) -> str:
    """Three digits and a decimal prefix."""
    prefix, value = next(
        ((p, v) for p, v in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)) if number >= v), ("", 1)
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


def streams() -> list[str]:
    """Memory, traffic and speed of `stream` on several devices that train different SAEs."""
    head = (
        "`stream` for",
        "GPUs",
        "SAEs each",
        "memory of a GPU",
        "sent by a GPU",
        "with DDP",
        "tokens/s",
        "passes not divided",
    )
    lines = [row(*head), "|" + "---|" * len(head)]
    for shape, counts in zip(SHAPES, ((8, 16), (8, 16, 32)), strict=True):
        for devices in counts:
            found = divided(shape, devices)
            traffic = [f"{size(found[name], 'B')}/token" for name in ("sent", "gradients")]
            speed = [f"{found[name]:,.0f}" for name in ("divided", "repeated")]
            lines.append(row(shape.name, devices, found["each"], size(found["memory"], "B"), *traffic, *speed))
    return lines


def page() -> str:
    """All tables, as they stand in docs/scaling.md."""
    sections = [measured(), *map(spans, SHAPES), streams()]
    return "\n\n".join("\n".join(lines) for lines in sections)


if __name__ == "__main__":
    print(page())
