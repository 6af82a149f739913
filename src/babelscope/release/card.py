"""The model card of uploaded SAEs: what they are, how to load them, from which texts, and how good they are."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import yaml

from babelscope.config import Config
from babelscope.config.values import expanded, local_name
from babelscope.core.files import read_json
from babelscope.core.git import git
from babelscope.core.paths import Paths
from babelscope.report.assets import asset
from babelscope.report.numbers import percent, plain

_TAGS = ["sparse-autoencoder", "mechanistic-interpretability", "multilingual", "babelscope"]


def build(repo: str, hookpoints: Sequence[str], licence: str | None, params: Config, paths: Paths) -> str:
    """The card as Markdown with the hub's metadata in front; figures are those of metrics/."""
    name = params.model.name
    is_local = params.model.source == "package" or name.startswith((".", "/", "~")) or expanded(name).is_dir()
    metadata: dict[str, Any] = {
        "library_name": "saelens",
        "tags": _TAGS,
        # The hub knows languages by their main codes alone.
        "language": list(dict.fromkeys(name.split("-")[0].lower() for name in params.languages)),
    }
    metadata |= {} if is_local else {"base_model": name}
    metadata |= {} if licence is None else {"license": licence}
    # A card is Markdown, in which HTML's escapes would be shown. The values are names and figures.
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # noqa: S701
    body = environment.from_string(asset("card.md.j2", "release")).render(
        repo=repo, first=hookpoints[0], params=params, model=local_name(params.model.name), licence=licence,
        rows=figures(hookpoints, paths), features=features(params, paths), sources=sources(paths),
        results=results(paths), commit=commit(paths),
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    )  # fmt: skip
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n{body}"


def _metrics(paths: Paths, stage: str, hookpoint: str | None = None) -> Mapping[str, Any]:
    path = paths.metrics(stage, hookpoint)
    return read_json(path) if path.is_file() else {}


def figures(hookpoints: Sequence[str], paths: Paths) -> list[list[str]]:
    """Hookpoint, FVU, L0, share of dead latents and loss recovered of every SAE."""
    quality = _metrics(paths, "quality")
    rows = []
    for name in hookpoints:
        train = _metrics(paths, "train", name)
        rows.append([
            name, plain(train.get("fvu"), 3), plain(train.get("l0"), 1), percent(train.get("dead_share")),
            plain(quality.get(f"loss_recovered/{name}"), 3),
        ])  # fmt: skip
    return rows


def features(params: Config, paths: Paths) -> list[list[str]]:
    """Language, number of its features, and the change of its own loss without them."""
    score, ablate = _metrics(paths, "score"), _metrics(paths, "ablate")
    return [[name, plain(score.get(f"features/{name}")), plain(ablate.get(f"dnll_own/{name}"), 3, sign=True)]
            for name in params.languages]  # fmt: skip


def results(paths: Paths) -> list[tuple[str, str]]:
    """What the features as a whole show."""
    score, ablate, identify, again = (_metrics(paths, name) for name in ("score", "ablate", "identify", "stability"))
    return [
        ("language-specific features", plain(score.get("features"))),
        ("effective languages of a feature, median", plain(score.get("effective_languages_median"), 2)),
        ("mean ΔNLL of a language without its features, nats/token", plain(ablate.get("own"), 3, sign=True)),
        ("mean absolute ΔNLL of the other languages, nats/token", plain(ablate.get("others_abs"), 4)),
        ("held-out texts whose language the features identify", percent(identify.get("accuracy/sae-count/units"), 2)),
        ("features matched in an SAE of another seed", percent(again.get("features_matched_share"))),
    ]


def sources(paths: Paths) -> list[list[str]]:
    """Where the texts come from: name, revision and licence of every source."""
    if not paths.sources.is_file():
        return []
    return [
        [entry["path"], entry.get("revision") or "–", entry.get("license") or licence_of(entry["path"]) or "not stated"]
        for entry in read_json(paths.sources)["sources"]
    ]


def licence_of(source: str) -> str | None:
    """The licence of the installed package whose message catalogs are a source (`gettext:<package>`)."""
    kind, _, package = source.partition(":")
    if kind != "gettext":
        return None
    try:
        found = importlib.metadata.metadata(package).json
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    lines = found.get("classifier", [])
    classifiers = [
        line.rpartition(" :: ")[2] for line in ([lines] if isinstance(lines, str) else lines) if "License" in line
    ]
    stated = [str(found.get("license_expression", "")), *classifiers, str(found.get("license", "")).split("\n")[0][:80]]
    return next((licence for licence in stated if licence), None)


def commit(paths: Paths) -> str:
    """The commit of the repository, and whether files that git tracks differ from it."""
    found = git(paths.root, "rev-parse", "HEAD")
    changed = git(paths.root, "status", "--porcelain", "--untracked-files=no")
    return (found or "no git repository").strip() + (" (with uncommitted changes)" if changed else "")
