"""`babelscope compare A B` for SAEs: how many latents the two have in common, with what chance alone would give."""

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from babelscope import sae
from babelscope.config.values import expanded
from babelscope.core.errors import UserError
from babelscope.core.files import read_table
from babelscope.core.paths import Paths
from babelscope.core.terminal import aligned
from babelscope.features import stability
from babelscope.sae import SAE, formats

log = logging.getLogger(__name__)

# Seed of the random latents.
_SEED = 0
_NOTE = """\
matched: share of the first SAE's latents whose one-to-one partner (Hungarian matching by decoder cosine) has this
cosine in decoder and encoder. PW-MCC: mean decoder cosine of the pairs. In parentheses: the same with random latents
that have the mean and the covariance of the second SAE's."""


class Common(NamedTuple):
    """What two SAEs of one hookpoint have in common.

    The `chance` values are those of random latents with the mean and covariance of the second SAE's.

    Attributes
    ----------
    latents, others: the widths of both.
    matched, matched_chance: share of the first SAE's latents whose one-to-one partner (Hungarian matching) has at least
        the wanted cosine in decoder and encoder (Paulo & Belrose 2025, arXiv 2501.16615).
    pw_mcc, pw_mcc_chance: mean decoder cosine of the pairs (PW-MCC, arXiv 2505.20254).
    encoder: mean encoder cosine of the pairs.
    features, features_chance: `matched` of the language-specific features alone; None if they are not known.
    """

    latents: int
    others: int
    matched: float
    matched_chance: float
    pw_mcc: float
    pw_mcc_chance: float
    encoder: float
    features: float | None = None
    features_chance: float | None = None


def main(first: str, second: str, hookpoints: Sequence[str], cosine: float) -> None:
    """Print a table with a row per hookpoint to the standard output."""
    sys.stdout.write(table(first, second, hookpoints, cosine, Paths(Path())) + "\n")


def table(first: str, second: str, hookpoints: Sequence[str], cosine: float, paths: Paths) -> str:
    """The comparison of every hookpoint that is in both, or of those named, as lines of text.

    The share of the language-specific features is known if `first` is this repository's `data/sae`.
    """
    own = expanded(first).is_dir() and expanded(first).resolve() == paths.saes.resolve() and paths.features.is_file()
    features = read_table(paths.features).filter(kind="sae") if own else None
    rows = []
    for name in chosen(first, second, hookpoints):
        units = [] if features is None else features.filter(hookpoint=name)["unit"].unique().sort().to_list()
        log.info("%s: matching", name or first)
        found = common(sae.load(first, name or None), sae.load(second, name or None), cosine, units)
        cells = [
            _cell(found.matched, found.matched_chance), _cell(found.pw_mcc, found.pw_mcc_chance), _cell(found.encoder),
            *([_cell(found.features, found.features_chance)] if features is not None else []),
        ]  # fmt: skip
        rows.append([name or "–", str(found.latents), str(found.others), *cells])
    head = ["hookpoint", "latents", "others", f"matched ≥ {cosine:g}", "PW-MCC", "encoder cosine"]
    head += ["language features matched"] if features is not None else []
    return "\n".join([f"{first} against {second}", "", *aligned([head, *rows], right=range(1, len(head))), "", _NOTE])


def _cell(value: float | None, chance: float | None = None) -> str:
    shown = "–" if value is None else f"{value:.3f}"
    return shown if chance is None else f"{shown} ({chance:.3f})"


def chosen(first: str, second: str, hookpoints: Sequence[str]) -> list[str]:
    """The hookpoints to compare; "" if each of the two is a single SAE, or a hub repository of one.

    Raises
    ------
    UserError: the two folders have no hookpoint in common.
    """
    if hookpoints:
        return list(hookpoints)
    found = [list(_names(expanded(source))) for source in (first, second) if expanded(source).is_dir()]
    several = [names for names in found if names != [""]]
    if not several:
        return [""]
    both = [name for name in several[0] if all(name in names for names in several)]
    if not both:
        parts = "; ".join(", ".join(names) or "none" for names in several)
        raise UserError(f"{first} and {second} have no hookpoint in common: {parts}; --hookpoint names one")
    return both


def _names(root: Path) -> Iterator[str]:
    """The folders below `root` that hold SAEs, "" for `root` itself, in the order of layers."""
    weights = {kind.weights for kind in formats.FORMATS}
    places = {path.parent.relative_to(root).as_posix() for path in root.rglob("*") if path.name in weights}
    for name in sorted(places, key=lambda name: [(not part.isdigit(), part.zfill(4)) for part in name.split(".")]):
        yield "" if name == "." else name


@torch.no_grad()
def common(first: SAE, second: SAE, cosine: float, units: Sequence[int] = ()) -> Common:
    """Compare two SAEs of the same hookpoint.

    Parameters
    ----------
    cosine: a latent is matched if its partner has at least this cosine in decoder and encoder.
    units: latents of the first SAE, whose share is also given alone.

    Raises
    ------
    UserError: their inputs or outputs differ in width, so that they are of different hookpoints or models.
    """
    if (first.d_in, first.d) != (second.d_in, second.d):
        sizes = " and ".join(f"[{one.d_in}] -> [{one.d}]" for one in (first, second))
        raise UserError(f"the two SAEs are of activations of different widths ({sizes}); allowed: the same hookpoint")
    latents, others = ((one.W_dec.detach(), one.encoder.detach()) for one in (first, second))
    found = stability.match(latents, others)
    chance = stability.match(latents, stability.random_latents(others, _SEED))

    def share(pair: tuple[Tensor, Tensor], rows: Sequence[int] | None = None) -> float:
        matched = (torch.stack(pair) >= cosine).all(0)
        return float((matched if rows is None else matched[torch.tensor(rows)]).double().mean())

    return Common(
        first.latents, second.latents, share(found), share(chance), float(found[0].nanmean()),
        float(chance[0].nanmean()), float(found[1].nanmean()),
        *((share(found, units), share(chance, units)) if units else (None, None)),
    )  # fmt: skip
