"""The command `babelscope`, which runs in the root of the repository."""

import argparse
from pathlib import Path

from babelscope.core import stage


def params_check() -> None:
    """Check params.yaml; unlike DVC's, the error messages name the key."""
    from babelscope import config

    config.check_folders(config.load())


def verify() -> None:
    """Re-hash the DVC cache and the outputs of all stages."""
    from babelscope.tracking import verify

    verify.main()


def export(target: Path, hookpoints: list[str]) -> None:
    """Write SAEs in the format of EleutherAI/sparsify, of all hookpoints or of those named."""
    from babelscope.sae import export

    export.main(target, hookpoints)


def delphi(target: Path, hookpoints: list[str]) -> None:
    """Write the firings of latents in the cache format of EleutherAI/delphi, of all hookpoints or of those named."""
    from babelscope.explain import delphi

    delphi.main(target, hookpoints)


def ui() -> None:
    """Print the address of the charts of all runs, and serve MLflow there until it is interrupted."""
    from babelscope.tracking import ui

    ui.main()


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; each command sets `function`, whose parameters are the other arguments."""
    top = argparse.ArgumentParser(prog="babelscope", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for function in (verify, export, delphi, ui):
        command = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        command.set_defaults(function=function)
        if function in (export, delphi):
            command.add_argument("target", type=Path, help="folder to write to; it is made if missing")
            command.add_argument("hookpoints", nargs="*", help="e.g. layers.14.mlp")
    params = commands.add_parser("params", help="Commands on params.yaml.").add_subparsers(required=True)
    check = params.add_parser("check", help=params_check.__doc__, description=params_check.__doc__)
    check.set_defaults(function=params_check)
    return top


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the arguments name (by default those of the process)."""
    chosen = vars(parser().parse_args(arguments))
    function = chosen.pop("function")
    stage.run(lambda: function(**chosen), locked=False)
