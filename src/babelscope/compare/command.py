"""`babelscope compare A B`: decides whether SAEs or states of the repository are compared."""

import logging
from collections.abc import Sequence
from pathlib import Path

from babelscope.compare import states
from babelscope.config.values import expanded
from babelscope.core.errors import UserError

log = logging.getLogger(__name__)


def main(first: str, second: str, hookpoints: Sequence[str], cosine: float, html: Path) -> None:
    """Compare two SAEs if one of the names is a folder or no revision; else two states.

    Raises
    ------
    UserError: one of the two is an SAE and the other a revision.
    """
    commits = [states.resolve(name, Path()) for name in (first, second)]
    for number, name in enumerate((first, second)):
        if expanded(name).is_dir():
            if commits[number] is not None:
                log.warning("%s is a folder and a git revision: the folder is taken (the branch: heads/%s)", name, name)
            commits[number] = None
    if None not in commits:
        from babelscope.compare import page

        page.main(first, second, html)
    elif commits == [None, None]:
        from babelscope.compare import saes

        saes.main(first, second, hookpoints, cosine)
    else:
        kinds = ["no git revision" if commit is None else "a git revision" for commit in commits]
        raise UserError(
            f"{first} is {kinds[0]}, but {second} is {kinds[1]}; allowed: two revisions, DVC experiments or "
            "'workspace', or two folders or hub ids of SAEs"
        )
