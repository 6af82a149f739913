"""The command `babelscope`, which runs in the root of the repository."""

import argparse
from pathlib import Path

from babelscope.core import stage


def params_check() -> None:
    """Check params.yaml; unlike DVC's, the error messages name the key."""
    from babelscope import config
    from babelscope.models.names import layer_of

    params = config.load()
    config.check_folders(params)
    if params.train.source == "pretrained" and (params.pretrained.name or "").startswith("sae-lens:"):
        from babelscope.sae import directory

        for hookpoint in params.hookpoints:
            directory.resolve(*params.pretrained.place_of(hookpoint, layer_of(hookpoint)))


def params_apply(name: str) -> None:
    """Put the values of experiments/NAME.yaml into params.yaml; all other lines and their comments stay."""
    from babelscope.config import overlay

    overlay.apply(name)


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
    apply = params.add_parser("apply", help=params_apply.__doc__, description=params_apply.__doc__)
    apply.add_argument("name", help="name of an experiment, e.g. llama-3.2-1b")
    apply.set_defaults(function=params_apply)
    return top


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the arguments name (by default those of the process)."""
    chosen = vars(parser().parse_args(arguments))
    function = chosen.pop("function")
    stage.run(lambda: function(**chosen), locked=False)
