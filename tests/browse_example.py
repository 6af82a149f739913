"""Made-up tables of `data/browse`, the same at every call, for the tests of the feature browser."""

import random
from pathlib import Path
from typing import Any

import polars as pl
import report_example as example

from babelscope.browse.firings import BINS

SCRIPT = "<script>window.hacked = 1</script>"
TEXTS = {
    "en": ["Family", " tree", " of", " the", " Smiths"],
    "de": ["Stamm", "baum", " der", " Familie"],
    "he": ["Gramps", " הוא", " תוכנה", " לחקר", " שורשים"],
    "ta": ["குடும்", "ப", " மர", "ம்"],
    "ja": ["家", "族", "の", "木"],
    "fi": [SCRIPT, " suku", "puu"],
}


def frames(features: int = 60, hookpoints: list[str] = example.HOOKPOINTS) -> dict[str, pl.DataFrame]:
    """`features` of them: every fourth is shared by two languages; the first of English fires nowhere else."""
    draw = random.Random(4)
    names = list(TEXTS)
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in ("features", "probabilities", "histograms")}
    tables |= {"examples": [], "tokens": [], "neighbours": []}
    for number in range(features):
        hookpoint = hookpoints[number * len(hookpoints) // features]
        key = {"hookpoint": hookpoint, "layer": int(hookpoint.split(".")[1]), "unit": 7 * number + 1}
        owners = [names[number % len(names)]]
        if number % 4 == 3:
            owners.append(names[(number + 1) % len(names)])
        measured = number % 5 != 4
        tables["features"].append({
            **key, "kind": "specific" if len(owners) == 1 else "shared", "languages": owners, "members": len(owners),
            "entropy": round(draw.random(), 3), "largest": 4.0 + number % 3,
            "delta": (delta := draw.gauss(0.01, 0.02)) if measured else None,
            "delta_low": delta - 0.01 if measured else None, "delta_high": delta + 0.01 if measured else None,
            "delta_tokens": 31 * measured, "delta_texts": 2 * measured,
        })  # fmt: skip
        tables["neighbours"] += [
            {**key, "place": place, "neighbour": unit, "cosine": 0.9 - 0.1 * place}
            for place, unit in enumerate((key["unit"] + 7, 1000003))
        ]
        for language in example.LANGUAGES:
            rate = 0.3 + 0.1 * draw.random() if language in owners else 0.02 * draw.random() * (number > 0)
            tables["probabilities"].append({**key, "language": language, "tokens": 1, "probability": rate})
        for place in range(BINS):
            counts = {"own": draw.randrange(90 - 3 * place), "other": draw.randrange(5) * (number > 0)}
            tables["histograms"].append({**key, "bin": place, "low": 0.0, "high": 1.0, **counts})
        for side in ("own", "sample", "other"):
            shown = (
                owners[:1]
                if side == "sample"
                else owners
                if side == "own"
                else [name for name in names if name not in owners][: 2 * (number > 0)]
            )
            for place, language in enumerate(shown):
                activations = [float(at + 1) * (at != 1) for at in range(len(TEXTS[language]))]
                row = {"side": side, "place": place, "text_id": f"text-{language}", "activations": activations}
                tables["examples"].append({**key, **row})
        for side, sign in (("promoted", 1), ("suppressed", -1)):
            for place in range(4):
                token = [" tree", "\\xe0\\xae", " שלום", f"word{number}", SCRIPT, "\n \u00a0\u200b", "木"][
                    (number + place) % 7
                ]
                row = {"side": side, "place": place, "token_id": place, "token": token, "logit": sign * (4.0 - place)}
                tables["tokens"].append({**key, **row})
    rows = [{"text_id": f"text-{k}", "language": k, "split": "train", "pieces": v} for k, v in TEXTS.items()]
    found = {name: pl.DataFrame(content, infer_schema_length=None) for name, content in tables.items()}
    return found | {"texts": pl.DataFrame(rows)}


def write(root: Path) -> None:
    """The example as the files that the stage `report` reads."""
    (root / "data/browse").mkdir(parents=True, exist_ok=True)
    for name, frame in frames().items():
        frame.write_parquet(root / f"data/browse/{name}.parquet")
