"""Every command in README.md and docs/ is run by a test, or stands here with the reason why none does."""

import ast
import hashlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closure import ROOT
from test_docs import PAGES, PARAMS, text_of

from babelscope import config
from babelscope.config import schema
from babelscope.core.errors import UserError
from babelscope.core.paths import Paths
from babelscope.features import run_score
from babelscope.models import hardware
from babelscope.tracking import verify

END_TO_END = "test_end_to_end.py"
DIFFS = f"{END_TO_END}::test_a_score_threshold_runs_score_and_what_follows_and_back_is_free"
ARRAY, S3 = (
    "test_cluster.py::test_array_jobs_side_by_side_and_a_server",
    "test_cluster.py::test_a_remote_in_s3_gives_the_bytes_back",
)
SENTENCE = "test_playground.py::test_the_command_prints_the_tokens_and_writes_the_page"
LISTED = "test_playground.py::test_the_first_features_of_a_language_are_listed"
SAES = "test_compare.py::test_folders_are_compared_at_the_hookpoints_that_both_have"
STATES = "test_compare.py::test_the_page_shows_both_and_needs_nothing_else"
SERVED = "test_cli.py::test_a_page_is_served_where_the_options_say"
COMPLETED = "test_cli.py::test_the_shells_complete_every_command"
TOY = "test_tracking.py::test_the_commands_of_the_readme"
# Command: the test or fixture that runs it, and what its source says of it.
TESTED = {
    "dvc repro": (f"{END_TO_END}::repo", '"dvc", "repro"'),
    "dvc repro -f -s sample": (
        "test_tracking.py::test_every_way_of_reaching_a_state_gives_its_runs_once",
        '"-f", "-s"',
    ),
    "dvc checkout": (f"{END_TO_END}::test_verify_finds_a_flipped_byte_in_every_file_of_every_output", '"checkout"'),
    "dvc repro score": (f"{END_TO_END}::test_without_stored_activations_the_outputs_are_the_same_files", '"identify"'),
    "babelscope params check": ("test_cli.py::test_params_are_checked_by_one_message", '"params", "check"'),
    "babelscope params apply": (
        "test_experiments.py::test_make_experiment_puts_it_in_place_and_runs_it",
        'make(checkout, "llama-3.2-1b")',
    ),
    "babelscope params apply llama-3.2-1b": (
        "test_experiments.py::test_make_experiment_puts_it_in_place_and_runs_it",
        'make(checkout, "llama-3.2-1b")',
    ),
    "babelscope export exported": (
        "test_export.py::test_every_sae_or_those_named_are_exported_and_load_to_the_same",
        'main(Path("out"), [])',
    ),
    "babelscope export exported layers.26.mlp": (
        "test_export.py::test_every_sae_or_those_named_are_exported_and_load_to_the_same",
        'main(Path("some"), ["layers.2.mlp"])',
    ),
    "babelscope export cache/latents --format delphi": (
        "test_delphi.py::test_every_hookpoint_of_params_is_written",
        "delphi.main(tmp_path, [])",
    ),
    "babelscope export cache/latents layers.26.mlp --format delphi": (
        "test_delphi.py::test_the_cache_holds_every_firing_at_its_token",
        "delphi.main(tmp_path, [SAE_AT])",
    ),
    "babelscope export steered --format lm-eval": (
        "test_export.py::test_a_file_per_language_says_what_lm_eval_adds_and_takes_out",
        '"export", "steered", "--format", "lm-eval"',
    ),
    "babelscope export dashboards --format saedashboard": (
        "test_saedashboard.py::test_every_feature_is_written_with_its_texts_tokens_and_histogram",
        '"--format", "saedashboard"',
    ),
    "babelscope export dashboards layers.14.post_feedforward_layernorm --format saedashboard": (
        "test_saedashboard.py::test_one_hookpoint_or_none",
        "saedashboard.main(tmp_path, [WIDE])",
    ),
    "babelscope export transcoders --format circuit-tracer": (
        "test_export.py::test_transcoders_are_a_set_of_circuit_tracer_and_load_to_the_same",
        '"--format", "circuit-tracer"',
    ),
    'babelscope try "Bugün hava çok güzel, but I stay home"': (SENTENCE, '"try", TURKISH'),
    'babelscope try "Bugün hava çok güzel, but I stay home" --html sentence.html': (
        SENTENCE,
        '"--html", "sentence.html"',
    ),
    'babelscope try "Bir cümle"': (SENTENCE, '"try", TURKISH'),
    'babelscope try "Bir cümle ve bir soru."': (SENTENCE, '"try", TURKISH'),
    "babelscope features tr": (LISTED, '["features", "tr"]'),
    "babelscope features tr --number 20": (LISTED, '"tr", "--number", "2"'),
    "babelscope serve": (SERVED, '["serve"]'),
    "babelscope serve --port 8001": (SERVED, '"serve", "--port", "8001"'),
    "babelscope compare data/sae data/sae_again/1000": (SAES, '"compare", "data/sae", "other"'),
    "babelscope compare data/sae other --hookpoint layers.10.mlp": (SAES, '"--hookpoint", "layers.10.mlp"'),
    "babelscope compare HEAD workspace": (STATES, '"compare", "HEAD", "workspace"'),
    "babelscope compare main my-experiment --html out/compare.html": (STATES, '"--html", "out/compare.html"'),
    "babelscope push me/gemma-3-270m-saes --folder pushed": (
        "test_push.py::test_one_hookpoint_is_written_to_a_folder_to_look_at",
        '"--folder", "out"',
    ),
    "babelscope push me/gemma-3-270m-saes --private --license apache-2.0": (
        "test_push.py::test_the_saes_are_uploaded_with_a_card_and_load_to_the_same",
        '"--private", "--license", "apache-2.0"',
    ),
    "babelscope completion bash > ~/.local/share/bash-completion/completions/babelscope": (COMPLETED, '"bash"'),
    "babelscope completion zsh": (COMPLETED, '"zsh"'),
    "dvc repro --single-item train@layers.14.mlp": (ARRAY, 'side_by_side(repo, "train"'),
    "dvc repro --single-item train@layers.18.mlp": (ARRAY, 'side_by_side(repo, "train"'),
    "dvc remote add -d lab s3://bucket/babelscope": (S3, '"remote", "add", "-d", "lab"'),
    "dvc remote modify lab endpointurl https://minio.example.org": (S3, '"remote", "modify", "lab", "endpointurl"'),
    "dvc push": (S3, '"push"'),
    "mlflow server --serve-artifacts": ("test_cluster.py::mlflow", '"server"'),
    "dvc metrics show": (DIFFS, '"metrics", "show"'),
    "dvc metrics diff": (DIFFS, '"metrics", "diff"'),
    "dvc exp show --only-changed --drop 'data\\|src\\|stages\\|metrics\\|reports'": (DIFFS, '"--only-changed"'),
    "dvc params diff": (DIFFS, '"params", "diff"'),
    "dvc plots show": (DIFFS, '("diff", "show")'),
    "dvc plots diff": (DIFFS, '("diff", "show")'),
    "dvc status": (TOY, '"status"'),
    "dvc exp run --temp": ("test_tracking.py::test_every_way_of_reaching_a_state_gives_its_runs_once", '"--temp"'),
    "dvc stage list": (TOY, '"stage", "list"'),
    "dvc dag --md": (TOY, '"dag", "--md"'),
    "dvc dag --md --collapse-foreach-matrix": (TOY, '"dag", "--md", "--collapse-foreach-matrix"'),
    "source .venv/bin/activate": (TOY, ".venv/bin/activate"),
    "make ui": ("test_mlflow_browser.py::address", '"ui"'),
    "MLFLOW_PORT=5001 make ui": ("test_mlflow_browser.py::address", "MLFLOW_PORT="),
    "make verify": ("test_files.py::test_verify_reports_through_the_same_door", "verify.main()"),
}
# Blocks that a test reads out of a page and runs as a whole, by a command in them.
BLOCKS = {"$EDITOR params.yaml": TOY, "dvc exp run --run-all": TOY, "dvc exp run -n loose": TOY}
UNTESTED = {
    "make repro": "sets up an environment from the registries; what it runs there, `dvc repro`, is tested",
    "make test": "what runs this test",
    "make dev": "the first step of `make test`",
    "make check": "a step of `make test`",
    "make format": "the tools of `make check`, which changes files",
    "make clean": "deletes the outputs of the repository that it is run in",
    "make bench": "an hour, and the peers' environments from the registries",
    "python benchmarks/": "minutes to hours each, on a machine that does nothing else",
    "pytest tests/": "is run by `make test`",
    "first=$(sbatch": "wants a SLURM cluster; test_cluster.py runs the array's script and checks the other's syntax",
    "sbatch": "wants a SLURM cluster; test_cluster.py runs the array's script and checks the other's syntax",
    "hf auth login": "wants an account on the hub",
    "make experiment NAME=": "wants the hub; test_experiments.py reads every file and tries what the target refuses",
    "dvc exp run -S ablate.additive_factor=0.2": "wants the hub; `dvc exp run -S` is run in test_tracking.py",
    "dvc exp run -S sharing.groups=100 report": "test_sharing.py runs the stage; `dvc exp run -S` is run in "
    "test_tracking.py",
    "dvc exp run -S switching.groups=6 report": "test_switching.py runs the stage; `dvc exp run -S` is run in "
    "test_tracking.py",
    "dvc exp run -S 'baselines.dictionaries=": "six trainings; test_baselines.py runs the stages",
    "dvc exp run -S ablate.script_draws=2": "minutes; test_knobs_run.py runs the stage with this param",
    "dvc config cache.type hardlink": "a setting of DVC's own",
    "dvc config --local": "a setting of DVC's own; test_experiments.py runs the target that makes it",
    "git init": "a command of git's own",
    "dvc gc --all-branches --all-tags --all-experiments": "a command of DVC's own, which throws outputs away",
    "dvc gc --workspace": "what the page says not to run",
    "dvc dag": "a command of DVC's own, which only prints",
    "dvc unprotect": "a command of DVC's own",
    "uv ": "wants uv; another way to the environment of `make repro`",
    "mlflow ui": "what `make ui` starts, with an app of its own",
    "make lock": "asks the registry for the hashes; test_release.py compares the lock file with what it locks",
    "touch .venv/.ready": "the last step of that way",
    "dvc pull": "a command of DVC's own; test_cluster.py runs `dvc pull`",
    "dvc repro --allow-missing": "a command of DVC's own",
    "dvc exp show": "README's block, which test_tracking.py runs, has it",
    "git diff metrics/": "a command of git's own",
    "python tools/": "minutes each, one as root; their parts are run by test_end_to_end.py and test_fuzz_parsers.py",
    "make .bench/": "an environment of a tool from the registries",
    "babelscope export TARGET": "the form of the commands that follow it on the page",
    "lm_eval --model": "wants the hub; test_export.py runs lm-eval's model on our files, and a task of its own",
    "CIRCUIT_TRACER_CACHE_DIR=": "wants the hub's model; test_export.py loads the set by that variable's means",
    "make audit": "wants the network: it asks PyPI for advisories",
    "git checkout dvc.lock": "a command of git's own",
    "dvc repro train@h": "stands for any hookpoint: test_concurrency.py runs them",
    "dvc commit": "what docs/slurm/nodes.sbatch does at its end, on a cluster",
    "dvc repro extract stream": "two stages of the `dvc repro` that test_end_to_end.py runs",
}
INLINE = re.compile(r"`((?:\w+=\S+ )?(?:dvc|make|python|pytest|git|mlflow|source|babelscope) [^`]+)`")


def blocks(page: Path) -> list[str]:
    return re.findall(r"```(?:sh|bash)\n(.*?)```", text_of(page), re.DOTALL)


def commands(page: Path, *, in_run_blocks: bool) -> list[str]:
    """The commands between backquotes, and the lines of the blocks (of those in `BLOCKS`, too, if so asked)."""
    found = INLINE.findall(re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL))
    for block in blocks(page):
        if in_run_blocks or not any(command in block for command in BLOCKS):
            found += (line.partition("#")[0].strip() for line in block.splitlines())
    return [command for command in found if command]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_run_by_a_test_or_says_why_not(page: Path) -> None:
    for command in commands(page, in_run_blocks=False):
        known = command in TESTED or any(command.startswith(one) for one in UNTESTED)
        assert known, f"{page.name}: {command}: run it in a test and name that in TESTED, or say in UNTESTED why not"


def test_what_is_listed_stands_on_a_page_and_in_the_test_named() -> None:
    listed = {command for page in PAGES for command in commands(page, in_run_blocks=True)}
    assert set(TESTED) <= listed, "no page has it any more"
    assert all(any(command.startswith(one) for command in listed) for one in UNTESTED)
    owners = {command: page.name for page in PAGES for block in blocks(page) for command in BLOCKS if command in block}
    assert owners.keys() == BLOCKS.keys()
    for name, said in [*TESTED.values(), *((test, owners[command]) for command, test in BLOCKS.items())]:
        assert said in source_of(name), f"{name} does not say {said}"


def source_of(name: str) -> str:
    file, _, function = name.partition("::")
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    [found] = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == function]
    return ast.get_source_segment(source, found) or ""


def test_the_only_python_on_the_pages_is_what_tests_run() -> None:
    assert [page.name for page in PAGES for _ in range(text_of(page).count("```python"))] == [
        "bridges.md",
        "library.md",
        "steering.md",
        "training.md",
    ]
    assert "docs/bridges.md" in source_of("test_export.py::test_the_lines_of_the_page_run_saebench_on_our_saes")
    assert "docs/library.md" in source_of(f"{END_TO_END}::test_the_library_runs_as_the_page_has_it")
    assert "docs/steering.md" in source_of("test_steering.py::test_the_lines_of_the_page_steer_as_the_stage_does")
    assert "docs/training.md" in source_of("test_sae_training.py::test_the_lines_of_the_page_run")


def parsed(**changes: Any) -> Callable[[], object]:
    content = {key: value | changes.get(key, {}) if isinstance(value, dict) else changes.get(key, value)
               for key, value in PARAMS.items()}  # fmt: skip
    return lambda: config.parse(content)


def score_without_counts() -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(text.replace("- layers.6.mlp\n- layers.10.mlp\n", ""), encoding="utf-8")
    run_score.run(config.load(), Paths())


def verify_a_damaged_cache() -> None:
    for content, held in ((b"a", b"b"), (b"c", b"c")):
        name = hashlib.md5(content).hexdigest()
        path = Path(".dvc/cache/files/md5") / name[:2] / name[2:]
        path.parent.mkdir(parents=True)
        path.write_bytes(held)
    verify.main()


def ask_for_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    hardware.prepare(schema.Hardware(**PARAMS["hardware"] | {"accelerator": "gpu"}))


PROVOKED = {
    "score.ratoi": parsed(score={"ratoi": 0.3}),
    "'many'": parsed(train={"k": "many"}),
    "stability.hookpoints": parsed(hookpoints=["layers.14.mlp"]),
    "train.latents": parsed(train={"k": 5000}),
    "'gpu'": ask_for_a_gpu,
    "totals.parquet": score_without_counts,
    "corrupt": verify_a_damaged_cache,
}
MESSAGES = re.findall(r"```text\n(.*?)\n```", text_of(ROOT / "docs/troubleshooting.md"), re.DOTALL)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:60])
def test_messages_are_printed_as_the_page_has_them(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    [provoke] = [run for part, run in PROVOKED.items() if part in message]
    with pytest.raises(UserError) as error, caplog.at_level(logging.WARNING):
        provoke()
    assert f"error: {error.value}" == message
