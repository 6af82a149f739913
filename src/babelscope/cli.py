"""The command `babelscope`, which runs in the root of the repository."""

import argparse
import importlib
import logging
from pathlib import Path

from babelscope.core import stage
from babelscope.core.paths import Paths

log = logging.getLogger(__name__)


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
    log.info("params.yaml is valid")


def params_apply(name: str) -> None:
    """Put the values of experiments/NAME.yaml into params.yaml; all other lines and their comments stay."""
    from babelscope.config import overlay

    overlay.apply(name)


def verify() -> None:
    """Re-hash the DVC cache and the outputs of all stages."""
    from babelscope.tracking import verify

    verify.main()


def export(target: Path, hookpoints: list[str], form: str) -> None:
    """Write SAEs, firings, vectors or features in the format of another tool (docs/bridges.md)."""
    importlib.import_module(f"babelscope.bridges.{form.replace('-', '_')}").main(target, hookpoints)
    sizes = [path.stat().st_size for path in target.rglob("*") if path.is_file()]
    log.info("%s holds %d files, %.1f MB", target, len(sizes), sum(sizes) / 1e6)


def ui() -> None:
    """Print the address of the charts of all runs, and serve MLflow there until it is interrupted."""
    from babelscope.tracking import ui

    ui.main()


def try_sentence(text: str, html: Path | None) -> None:
    """Print the tokens of a sentence with the language-specific features that fire on them, and its language."""
    from babelscope.playground import sentence

    sentence.main(text, html)


def features(language: str, number: int) -> None:
    """List the first features of a language, with what they fire on, what they promote, and their effect."""
    from babelscope.playground import listing

    listing.main(language, number)


def serve(host: str, port: int) -> None:
    """Serve a local page: type a sentence, see its features token by token, amplify one and see the continuation."""
    from babelscope.playground import server

    server.main(host, port)


def compare(first: str, second: str, hookpoints: list[str], cosine: float, html: Path) -> None:
    """Compare two SAEs or folders of SAEs (a table), or two git revisions or DVC experiments (a page)."""
    from babelscope.compare import command

    command.main(first, second, hookpoints, cosine, html)


def push(repo: str, hookpoints: list[str], private: bool, licence: str | None, folder: Path | None) -> None:
    """Upload the SAEs to the Hugging Face hub, all or those named, with a model card."""
    from babelscope.release import push

    push.main(repo, hookpoints, private, licence, folder)


def completion(shell: str) -> None:
    """Print the script that lets a shell complete this command."""
    import sys

    import shtab

    sys.stdout.write(shtab.complete(parser(), shell) + "\n")


SHELLS = ("bash", "zsh", "tcsh")
# What `export` writes; each is a module of babelscope.bridges.
FORMATS = ("sparsify", "circuit-tracer", "delphi", "lm-eval", "saedashboard")


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; each command sets `function`, whose parameters are the other arguments."""
    top = argparse.ArgumentParser(prog="babelscope", description=__doc__, epilog="docs/cli.md has examples.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: object, example: str = "") -> argparse.ArgumentParser:
        epilog = f"example: babelscope {name} {example}" if example else None
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__, epilog=epilog)
        command.set_defaults(function=function)
        return command

    command = add("try", try_sentence, '"Bugün hava çok güzel" --html sentence.html')
    command.add_argument("text", help="the sentence; longer ones are cut at corpus.max_tokens")
    command.add_argument("--html", type=Path, metavar="FILE", help="also write it as a page")
    command = add("features", features, "tr --number 20")
    command.add_argument("language", help="one of params.yaml's languages")
    command.add_argument("--number", type=positive, default=10, metavar="N", help="how many features (default: 10)")
    command = add(
        "compare", compare, "data/sae data/sae_again/1000 (two folders), or: compare HEAD~1 workspace (two states)"
    )
    command.add_argument("first", help="folder or hub id of SAEs; or a git revision, a DVC experiment, or 'workspace'")
    command.add_argument("second", help="the same kind as the first")
    command.add_argument("--hookpoint", action="append", default=[], dest="hookpoints", metavar="NAME",
                         help="of SAEs: a hookpoint to compare; repeatable (default: all of both)")  # fmt: skip
    command.add_argument("--cosine", type=float, default=0.7, metavar="C",
                         help="of SAEs: latents are matched from this cosine on (default: 0.7)")  # fmt: skip
    command.add_argument("--html", type=Path, default=Paths().reports / "compare.html", metavar="FILE",
                         help="of states: the page to write (default: reports/compare.html)")  # fmt: skip
    command = add("serve", serve, "--port 8001")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    command.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    command = add("export", export, "exported layers.14.mlp --format delphi")
    command.add_argument("target", type=Path, help="folder to write to; it is made if missing")
    command.add_argument("hookpoints", nargs="*", help="e.g. layers.14.mlp (default: all)")
    command.add_argument("--format", choices=FORMATS, default=FORMATS[0], dest="form", help="default: sparsify")
    command = add("push", push, "me/gemma-3-270m-saes layers.14.mlp --license apache-2.0")
    command.add_argument("repo", help="OWNER/NAME on the hub; it is made if missing")
    command.add_argument("hookpoints", nargs="*", help="e.g. layers.14.mlp (default: all)")
    command.add_argument("--private", action="store_true", help="make the repository private")
    command.add_argument("--license", dest="licence", metavar="ID", help="of the SAEs, e.g. apache-2.0, for the card")
    command.add_argument("--folder", type=Path, help="upload nothing: write the files to this folder to look at them")
    add("ui", ui)
    add("verify", verify)
    params = commands.add_parser("params", help="Commands on params.yaml.").add_subparsers(
        required=True, help="what to do"
    )
    check = params.add_parser("check", help=params_check.__doc__, description=params_check.__doc__)
    check.set_defaults(function=params_check)
    apply = params.add_parser("apply", help=params_apply.__doc__, description=params_apply.__doc__)
    apply.add_argument("name", help="name of an experiment, e.g. llama-3.2-1b")
    apply.set_defaults(function=params_apply)
    command = add("completion", completion, "bash > ~/.local/share/bash-completion/completions/babelscope")
    command.add_argument("shell", choices=SHELLS, help="the shell")
    return top


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the arguments name (by default those of the process)."""
    chosen = vars(parser().parse_args(arguments))
    function = chosen.pop("function")
    stage.run(lambda: function(**chosen), locked=False)
