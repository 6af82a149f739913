"""Tracking against a real toy DVC repository: whatever is done to it, MLflow holds exactly the right runs."""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import warm
from ruamel.yaml import YAML
from toy_pipeline import DVC_YAML, STEPS, loss

from babelscope.core.fingerprint import dvc_md5

ROOT = Path(__file__).parent.parent
HOOKPOINTS, LANGUAGES = ["layers.6.mlp", "layers.10.mlp"], ["en", "no", "fi"]


class Repo:
    """A toy repository and what MLflow has of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def environment(self, **more: str) -> dict[str, str]:
        # The tests may themselves run inside a stage or beside a server.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "GIT_", "PYTEST_"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), inherited["PATH"]])
        own = {"PATH": path, "PYTHONPATH": str(ROOT / "src"), "DVC_NO_ANALYTICS": "1"}
        # No server of `core.warm`: it would import torch for stages that do not.
        return inherited | own | {"BABELSCOPE_SERVER": "none"} | more

    def run(self, *command: str, fails: bool = False, **environment: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment(**environment), capture_output=True, text=True, timeout=120
        )
        assert (done.returncode != 0) == fails, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def dvc(self, *arguments: str, fails: bool = False, **environment: str) -> str:
        code, said = warm.run(self.folder, "dvc", *arguments, env=self.environment(**environment))
        assert (code != 0) == fails, f"dvc {' '.join(arguments)}\n{said}"
        return said

    def commit(self) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", "state")

    def set(self, *place_and_value: object) -> None:
        """Change a param: the keys that lead to it, then its value."""
        *place, key, value = place_and_value
        content = YAML_.load((self.folder / "params.yaml").read_text())
        section = content
        for part in place:
            section = section[part]
        section[key] = value
        with (self.folder / "params.yaml").open("w") as handle:
            YAML_.dump(content, handle)

    def runs(self) -> list["Run"]:
        """The runs that are not deleted, read from the database itself."""
        with closing(sqlite3.connect(self.folder / "mlflow.db")) as connection:
            rows = connection.execute(
                "SELECT run_uuid, status, artifact_uri FROM runs JOIN experiments USING (experiment_id) "
                "WHERE runs.lifecycle_stage = 'active' AND experiments.name = 'toy'"
            ).fetchall()
            return [Run(connection, *row) for row in rows]

    def names(self) -> dict[str, int]:
        """How many runs there are of each kind, k and stage; all must be finished and whole."""
        runs = self.runs()
        for run in runs:
            assert run.status == "FINISHED", run.tags
            if run.tags["babelscope.kind"] == "training":
                assert run.series("loss") == [(step, loss(run.k, step)) for step in STEPS]
                assert [step for step, _ in run.series("fvu")] == [0, 20, 40, 60, 80]
        names = (" ".join([r.tags["babelscope.kind"], str(r.k), r.tags.get("dvc.stage", "")]).strip() for r in runs)
        return dict(Counter(names))

    def of(self, kind: str) -> list["Run"]:
        return [run for run in self.runs() if run.tags["babelscope.kind"] == kind]


class Run:
    def __init__(self, connection: sqlite3.Connection, key: str, status: str, place: str) -> None:
        self.id, self.status, self.artifacts = key, status, Path(place)
        query = "SELECT {} FROM {} WHERE run_uuid = ?"
        self.tags = dict(connection.execute(query.format("key, value", "tags"), [key]))
        self.params = dict(connection.execute(query.format("key, value", "params"), [key]))
        self.points = connection.execute(query.format("key, step, value", "metrics"), [key]).fetchall()
        self.digests = [
            digest
            for (digest,) in connection.execute(
                "SELECT digest FROM datasets JOIN inputs ON source_id = dataset_uuid WHERE destination_id = ?",
                [key],
            )
        ]

    @property
    def k(self) -> int:
        return int(self.params["train.k"])

    def series(self, key: str) -> list[tuple[int, float]]:
        return sorted((step, value) for name, step, value in self.points if name == key)

    def value(self, key: str) -> float:
        [(_, value)] = self.series(key)
        return value


YAML_ = YAML()


def expected(*ks: int, hookpoints: int = 2) -> dict[str, int]:
    stages = [f"train@{hookpoint}" for hookpoint in HOOKPOINTS[:hookpoints]]
    return {name: 1 for k in ks for name in (f"summary {k}", *(f"training {k} {stage}" for stage in stages))}


def toy(folder: Path) -> Repo:
    """A new toy repository in `folder`, with nothing run."""
    folder.mkdir()
    params = YAML_.load((ROOT / "params.yaml").read_text())
    params["languages"], params["hookpoints"] = LANGUAGES, HOOKPOINTS
    params["track"]["experiment"], params["track"]["live_after"] = "toy", 0
    params["train"]["k"] = 4
    params["stability"]["hookpoints"] = params["steer"]["hookpoints"] = []
    params["steer"]["prompt_languages"] = ["en"]
    with (folder / "params.yaml").open("w") as handle:
        YAML_.dump(params, handle)
    text = DVC_YAML.format(toy=ROOT / "tests/toy_pipeline.py", track=ROOT / "stages/track.py")
    (folder / "dvc.yaml").write_text(text)
    shutil.copy(ROOT / ".gitignore", folder)
    shutil.copy(ROOT / ".dvcignore", folder)
    found = Repo(folder)
    found.run("git", "init", "-q", "-b", "main")
    for key, value in {"user.name": "toy", "user.email": "toy@example.org", "commit.gpgsign": "false"}.items():
        found.run("git", "config", key, value)
    found.dvc("init", "-q")
    found.commit()
    return found


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    return toy(tmp_path / "repo")


def test_the_commands_of_the_readme(repo: Repo) -> None:
    repo.set("hookpoints", HOOKPOINTS[:1])
    repo.dvc("repro")
    repo.commit()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ask, experiments = [part for part in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "dvc" in part]
    assert ask.count(" && make ui") == 1 and "$EDITOR params.yaml" in ask  # test_mlflow_browser.py has what serves
    (repo.folder / ".venv/bin").mkdir(parents=True)
    (repo.folder / ".venv/bin/activate").touch()  # these tests run in an environment that is there already
    edit = repo.folder / ".venv/edit.py"
    edit.write_text("from pathlib import Path\n\npath = Path('params.yaml')\n"
                    "path.write_text(path.read_text().replace('  k: 4\\n', '  k: 8\\n'))\n")  # fmt: skip
    shown = repo.run("bash", "-ec", ask.replace(" && make ui", ""), EDITOR=f"{sys.executable} {edit}")
    assert re.search(r"train\.layers\.6\.mlp\.json\s+fvu", shown) and "Lower the ratio" in shown
    assert repo.names() == expected(4, 8, hookpoints=1)

    commands = [line.partition("#")[0].split() for line in experiments.splitlines()]
    assert [command[:3] for command in commands].count(["dvc", "exp", "run"]) == 3
    told = {" ".join(command[:3]): repo.dvc(*command[1:]) for command in commands}
    assert all(name in told["dvc exp show"] for name in ("wide", "sparse", "train.k"))
    assert YAML_.load((repo.folder / "params.yaml").read_text())["train"]["k"] == 16
    assert repo.names() == expected(4, 8, 16, 64, hookpoints=1)

    # What scaling.md says of remotes.
    repo.dvc("remote", "add", "--default", "shared", str(repo.folder.with_name("remote")))
    repo.dvc("push")
    for folder in (".dvc/cache", "data/sae"):
        shutil.rmtree(repo.folder / folder)
    assert "deleted" in repo.dvc("status")
    repo.dvc("pull")
    assert (repo.folder / "data/sae" / HOOKPOINTS[0] / "history.csv").is_file()
    assert "didn't change, skipping" in repo.dvc("repro", f"train@{HOOKPOINTS[0]}")

    # The tutorial's last step, and what stages.md and dvc.md say of the graph.
    text = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    [change] = [part for part in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "dvc exp run -n loose" in part]
    told = repo.run("bash", "-ec", change)
    assert re.findall(r"Running stage '([^']+)'", told) == ["score", "track"]  # the toy's report is the same
    assert "Three languages" in told and "score.ratio" in told
    listed = [line.split()[0] for line in repo.dvc("stage", "list").splitlines()]
    assert listed == ["sample", f"train@{HOOKPOINTS[0]}", "score", "report", "track"]
    drawn = repo.dvc("dag", "--md", "--collapse-foreach-matrix")
    assert "```mermaid" in drawn and '["train"]' in drawn


def test_every_way_of_reaching_a_state_gives_its_runs_once(repo: Repo) -> None:
    repo.dvc("repro")
    assert repo.names() == expected(4)
    check_summary(repo)
    check_hashes(repo)

    assert "is in MLflow already" in repo.dvc("repro")
    assert repo.names() == expected(4)
    repo.commit()

    repo.set("train", "k", 8)
    repo.dvc("repro")
    repo.set("train", "k", 4)
    repo.dvc("repro")
    assert repo.names() == expected(4, 8)

    for file in repo.folder.glob("mlflow.db*"):
        file.unlink()
    repo.dvc("repro")
    assert repo.names() == expected(4)
    assert all(run.tags["babelscope.backfilled"] == "true" for run in repo.of("training"))
    check_summary(repo)

    # Repeated by force, a training takes the place of what was rebuilt from its history.
    repo.dvc("repro", "-f", "-s", "train@layers.6.mlp")
    assert repo.names() == expected(4)
    assert sum("babelscope.backfilled" in run.tags for run in repo.of("training")) == 1

    # A state from an experiment in the workspace, then one computed in a copy of the repository.
    repo.dvc("exp", "run", "-S", "train.k=8")
    assert repo.names() == expected(4, 8)
    repo.run("git", "checkout", "-q", ".")
    repo.dvc("checkout")
    repo.dvc("exp", "run", "--temp", "-S", "train.k=16", "-n", "sixteen")
    assert repo.names() == expected(4, 8, 16)
    repo.dvc("exp", "apply", "sixteen")
    repo.dvc("repro")
    repo.run("git", "checkout", "-q", ".")
    repo.dvc("checkout")
    repo.dvc("repro")
    assert repo.names() == expected(4, 8, 16)
    assert all(run.artifacts.is_relative_to(repo.folder / "mlruns") for run in repo.runs())


def check_summary(repo: Repo) -> None:
    """What the summary run of k = 4 holds, by hand."""
    [run] = repo.of("summary")
    # en: round(2 * 10 / 2) = 10 in layer 6, 20 in layer 10; no: 15 and 30; fi has none.
    assert run.series("features_by_layer/en") == [(6, 10), (10, 20)]
    assert run.series("features_by_layer/no") == [(6, 15), (10, 30)]
    assert run.series("features_by_layer/fi") == [(6, 0), (10, 0)]
    assert run.series("features_by_layer/all") == [(6, 25), (10, 50)]
    fvu = loss(4, 100)
    assert run.series("fvu_by_layer") == [(6, fvu), (10, fvu)]
    assert run.series("fvu_by_layer/en") == [(6, fvu + 0.01), (10, fvu + 0.01)]
    assert run.series("dnll_own_by_layer/no") == [(6, pytest.approx(0.15)), (10, pytest.approx(0.3))]
    assert run.series("tokens_by_layer") == [(6, 5), (10, 5)]
    figures = {"features/no": 45, "features/fi": 0, "dnll_own/no": 0.1, "own": 0.2}
    figures |= {"tokens/sample": 7, "tokens/score": 3, "texts": 3}
    assert {key: run.value(key) for key in figures} == figures
    assert run.params["languages"] == "en, no, fi"
    assert ": 75 language-specific features of 3 languages at 2 hookpoints." in run.tags["mlflow.note.content"]
    assert not any(key.startswith("hardware") for key in run.params)
    assert run.tags["mlflow.source.git.commit"] == repo.run("git", "rev-parse", "HEAD").strip()
    files = {path.relative_to(run.artifacts).as_posix() for path in run.artifacts.rglob("*") if path.is_file()}
    assert files == {"features.csv", "languages.json", "pipeline/dvc.lock", "pipeline/params.yaml", "report.html"}
    [digest] = run.digests
    assert dvc_md5(repo.folder / "data/corpus/texts.parquet").startswith(digest)


def check_hashes(repo: Repo) -> None:
    """`dvc_md5` says what DVC has written into dvc.lock, of files and folders, ignored files left out."""
    (repo.folder / "data/sae/.gitignore").write_text("layers.6.mlp\n")
    locked = YAML_.load((repo.folder / "dvc.lock").read_text())["stages"]
    entries = {e["path"]: e["md5"] for s in locked.values() for e in [*s.get("deps", []), *s.get("outs", [])]}
    folders = [path for path, md5 in entries.items() if md5.endswith(".dir")]
    assert {"data/sae", "data/sae/layers.6.mlp", "reports"} <= set(folders)
    assert {path: dvc_md5(repo.folder / path) for path in entries} == entries


def test_a_killed_training_a_dead_server_and_a_moved_repository(repo: Repo) -> None:
    repo.set("hookpoints", HOOKPOINTS[:1])
    repo.dvc("repro", fails=True, TOY_DIE=HOOKPOINTS[0])
    [killed] = repo.runs()
    assert (killed.status, len(killed.series("loss"))) == ("RUNNING", 5)
    repo.dvc("repro")
    assert repo.names() == expected(4, hookpoints=1)
    assert [run.id for run in repo.of("training")] == [killed.id]

    repo.set("train", "k", 8)
    output = repo.dvc("repro", MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert "training goes on" in output and "the next `dvc repro` will" in output
    assert repo.names() == expected(4, hookpoints=1)

    moved = repo.folder.with_name("moved")
    repo.folder.rename(moved)
    repo.folder = moved
    assert "was moved" in repo.dvc("repro")
    assert repo.names() == expected(4, 8, hookpoints=1)
    for run in repo.of("summary"):
        assert run.artifacts.is_relative_to(moved) and (run.artifacts / "report.html").is_file()


def test_two_processes_make_the_database_at_once(tmp_path: Path) -> None:
    code = (
        "from babelscope.tracking.store import open_store; s = open_store('toy'); s.client.create_run(s.experiment_id)"
    )
    repo = Repo(tmp_path)
    both = [subprocess.Popen([sys.executable, "-c", code], env=repo.environment(), cwd=tmp_path) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert len(repo.runs()) == 2
    assert (tmp_path / "mlflow.db").read_bytes()[18:20] == b"\x02\x02"  # write-ahead log
