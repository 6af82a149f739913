"""Count how many SAEs in SAELens' directory of releases Babelscope can load, by format, as in docs/pretrained.md.

    python tools/released_saes.py [pretrained_saes.yaml]

Without the file, it is that of the installed package sae-lens. Nothing is downloaded: an SAE counts as loadable if its
format is read here, and neither its entry nor its name shows an obstacle (`babelscope.sae.directory.obstacle`).
"""

import sys
from collections import Counter
from pathlib import Path

from babelscope.sae import directory


def table(path: Path | None = None) -> str:
    """A Markdown table: releases, SAEs and loadable SAEs by format, and why the others are not."""
    releases, saes, loaded = Counter[str](), Counter[str](), Counter[str]()
    obstacles: dict[str, Counter[str]] = {}
    for release, about in directory.read(path).items():
        kind = directory.FORMATS.get(about.get("conversion_func"), str(about.get("conversion_func")))
        releases[kind] += 1
        for sae in about["saes"]:
            saes[kind] += 1
            reason = directory.obstacle(release, about, sae)
            loaded[kind] += reason is None
            if reason is not None:
                obstacles.setdefault(kind, Counter())[reason] += 1
    lines = ["| format | releases | SAEs | loadable | why not the others |", "|---|---|---|---|---|"]
    for kind, count in sorted(saes.items(), key=lambda item: (-item[1], item[0])):
        why = "; ".join(f"{n}: {reason}" for reason, n in obstacles.get(kind, Counter()).most_common())
        lines.append(f"| {kind} | {releases[kind]} | {count:,} | {loaded[kind]:,} | {why} |")
    share = 100 * loaded.total() / saes.total()
    lines.append(f"| all | {releases.total()} | {saes.total():,} | {loaded.total():,} ({share:.1f} %) | |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
