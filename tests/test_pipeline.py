"""dvc.yaml and params.yaml against the code: nothing is read that is not declared, and the other way round."""

import ast
import re
from pathlib import Path

import pytest
from closure import ROOT, closure
from ruamel.yaml import YAML

from babelscope import config
from babelscope.core.fingerprint import NO_DEPENDENCIES

PIPELINE = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
STAGES = {name: re.search(r"stages/\w+\.py", stage["cmd"]).group() for name, stage in PIPELINE.items()}


def test_every_script_is_a_stage_of_its_name():
    scripts = {str(path.relative_to(ROOT)) for path in (ROOT / "stages").glob("*.py")}
    assert set(STAGES.values()) == scripts
    assert all(path == f"stages/{name}.py" for name, path in STAGES.items())


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_exactly_the_packages_that_it_may_import(name):
    declared = {dep for dep in PIPELINE[name]["deps"] if dep.startswith(("src/", "stages/"))}
    imported = {path.split("/")[2] for path in closure(ROOT / STAGES[name]) if path.count("/") > 2}
    free = () if name in ("report", "track") else NO_DEPENDENCIES  # `prune` computes nothing
    packages = imported - set(free) - {"core", "config"}
    expected = {f"src/babelscope/{package}" for package in packages} | {STAGES[name]}
    if name == "report":  # see the next test
        expected |= {dep for name in MATRIX for dep in PIPELINE[name]["deps"] if dep.startswith(("src/", "stages/"))}
    assert declared == expected


# The stages per hookpoint with figures, whose files `report` reads, but cannot depend on.
MATRIX = [name for name, stage in PIPELINE.items() if "matrix" in stage and "plots" in stage]


def test_the_report_depends_on_all_that_decides_the_figures_that_it_reads():
    report = PIPELINE["report"]
    folders = {dep.removesuffix("/${item.hookpoint}") for name in MATRIX for dep in PIPELINE[name]["deps"]}
    covered = {dep for dep in folders if any(f"{dep}/".startswith(f"{other}/") for other in report["deps"])}
    assert MATRIX == ["train", "encode"] and folders == covered
    assert {key for name in MATRIX for key in PIPELINE[name]["params"]} - {"train.source"} <= set(report["params"])
    single = {path for name, stage in PIPELINE.items() if name not in MATRIX for path in written(stage)}
    assert single == {dep for dep in report["deps"] if dep.startswith("metrics")}


def written(stage):
    """The files of figures that a stage writes, without the summary."""
    return [path for entry in stage.get("plots", []) for path in entry]


def test_packages_that_are_no_dependency_cannot_compute():
    for package in ("core", "config"):
        for path in (ROOT / "src/babelscope" / package).rglob("*.py"):
            imports = re.findall(
                r"^\s*(?:from|import) (torch|numpy|transformers|lightning|scipy)\b", path.read_text(), re.M
            )
            assert path.name == "resume.py" or not imports, path


def test_the_house_keeps_to_its_sizes():
    lines = {path: len(path.read_text().splitlines()) for path in ROOT.glob("src/babelscope/**/*.py")}
    assert {str(path): count for path, count in lines.items() if count > 400} == {}
    scripts = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("stages/*.py")}
    assert {name: count for name, count in scripts.items() if count > 15} == {} and sum(scripts.values()) <= 300
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) < 400


def test_packages_import_each_other_in_one_direction():
    imports: dict[str, set[str]] = {}
    for path in (ROOT / "src/babelscope").glob("*/**/*.py"):
        package = path.relative_to(ROOT / "src/babelscope").parts[0]
        found = re.findall(r"^\s*from babelscope(?:\.(\w+)\S*)? import (\w+)", path.read_text(), re.M)
        imports.setdefault(package, set()).update({module or name for module, name in found} - {package})
    done: set[str] = set()
    while ready := {
        package for package, needs in imports.items() if package not in done and needs & set(imports) <= done
    }:
        done |= ready
    assert done == set(imports)


FIELDS = set(config.Config.model_fields)


def dumped(call):
    """What `params.model_dump(include=...)` or `(exclude=...)` reads."""
    for argument in call.keywords:
        if argument.arg in ("include", "exclude"):
            named = ast.literal_eval(argument.value)
            if isinstance(named, dict):
                parts = {
                    section: [""] if some is True else [f".{key}" for key in some] for section, some in named.items()
                }
                return {section + key for section, some in parts.items() for key in some}
            return named if argument.arg == "include" else FIELDS - named
    return FIELDS


def params_read(source):
    """The keys of params.yaml that a stage's code reads by name: `section`, or `section.key`."""
    found, part_of = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "params.model_dump":
            found |= dumped(node)
        if not isinstance(node, ast.Attribute):
            continue
        above = ast.unparse(node.value)
        if above.removeprefix("params.") in FIELDS and above.startswith("params."):
            section = above.removeprefix("params.")
            of = config.Config.model_fields[section].annotation
            found.add(f"{section}.{node.attr}" if node.attr in getattr(of, "model_fields", {}) else section)
            part_of.add(node.value)
        elif above == "params" and node.attr in FIELDS and node not in part_of:
            found.add(node.attr)
    return found


def test_what_a_stage_reads_is_seen():
    assert params_read("f(params.train.k, params.score.model_dump())\nx = params.steer") == {
        "train.k",
        "score",
        "steer",
    }
    assert params_read('params.model_dump(include={"seed"})') == {"seed"}
    assert params_read('params.model_dump(exclude={"track"}, exclude_unset=True)') == FIELDS - {"track"}


def code_of(name):
    """The source of what a stage's script runs: the module that it imports inside of `main`."""
    script = (ROOT / STAGES[name]).read_text()
    module = re.search(r"^    from (babelscope\.[\w.]+) import run\b", script, re.M)
    return (ROOT / "src" / (module[1].replace(".", "/") + ".py")).read_text() if module else ""


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_the_params_that_its_code_reads(name):
    read = params_read((ROOT / STAGES[name]).read_text()) | params_read(code_of(name))
    declared = set(PIPELINE[name].get("params", []))
    free = ("hardware", "track")
    assert {key for key in read if key.split(".")[0] not in free and not {key, key.split(".")[0]} & declared} == set()
    assert {param.split(".")[0] for param in declared} <= set(config.Config.model_fields) - set(free)


def test_every_stage_finds_the_library_in_its_own_checkout_and_ends_with_dvc():
    # Not every shell gives way to its last command by itself, and a stage sees only its parent end.
    assert all(stage["cmd"].startswith("exec env PYTHONPATH=src python stages/") for stage in PIPELINE.values())


def test_figures_are_kept_in_git_only_the_summary_is_a_metric_and_nothing_persists():
    text = (ROOT / "dvc.yaml").read_text()
    assert "persist" not in text
    for name, stage in PIPELINE.items():
        entries = [*stage.get("metrics", []), *stage.get("plots", [])]
        assert all(options == {"cache": False} for entry in entries for options in entry.values())
        assert all(re.match(rf"metrics/{name}\.", path) for path in written(stage))
        assert stage.get("metrics", []) == ([{"metrics/summary.json": {"cache": False}}] if name == "report" else [])


def test_the_library_never_imports_a_stage_and_keeps_to_its_rooms():
    rooms = {"scoring.py": ("torch",), "sae": ("transformers",), "corpus": ("torch", "mlflow"), "report": ("torch",)}
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) stages", text, re.M), path
        room = path.relative_to(ROOT / "src/babelscope").parts[0]
        if room != "tracking":
            assert not re.search(r"^\s*(from|import) mlflow", text, re.M), path
        for forbidden in rooms.get(room, ()):
            assert not re.search(rf"^\s*(from|import) {forbidden}\b", text, re.M), path


def test_every_knob_of_params_yaml_has_a_comment_and_the_file_is_as_dvc_writes_it(tmp_path):
    lines = Path(ROOT / "params.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        if not re.match(r"\s+\w+:", line) or "  # " in line:
            continue
        above = number - 1
        while re.match(r"\s+\w+:", lines[above]):
            above -= 1
        # A comment between two lists would be lost: the one above the first names both.
        named = f"  # {line.strip().partition(':')[0]}: " in "\n".join(lines)
        assert lines[above].strip().startswith("#") or "hardware:" in lines[above] or named, line
    yaml = YAML()
    content = yaml.load("\n".join(lines) + "\n")
    with (tmp_path / "again.yaml").open("w") as handle:
        yaml.dump(content, handle)
    assert (tmp_path / "again.yaml").read_text().splitlines() == lines
