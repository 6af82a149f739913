"""The real pipeline on the real embedded model at a small size, in a temporary clone: `dvc repro` and what follows."""

import datetime
import itertools
import json
import os
import re
import shutil
import socket
import sqlite3
import sys
import tempfile
from pathlib import Path

import kills
import polars as pl
import pytest
import warm
from clone import CANARY, SMALL, clone, dvc, environment, hashes, ran, run, runs, script, set_params
from closure import ROOT
from test_invalidation import AFTER_SCORE

from babelscope import sae
from babelscope.tracking import verify

# What a stage closes with: the head of its table, or, where there was nothing to find, a line that says so.
CLOSING = {
    "sample": "language train tokens texts eval tokens texts",
    "extract": "hookpoint width MB stored",
    "neurons": "neurons: none to count (params.yaml: neurons.hookpoints)",
    "stream": "stream: nothing to do (params.yaml: train.source is 'stored')",
    "train": "hookpoint tokens FVU (held out) lowest highest L0 dead latents",
    "encode": "hookpoint tokens latents that fired L0",
    "retrain": "SAE hookpoint seed FVU (last batch)",
    "prune": "prune: nothing to delete",
    "extend": "extend: no language to add (params.yaml: corpus.train_languages)",
    "quality": "hookpoint NLL with the SAE with zeros recovered 95 % least of a language",
    "score": "language features effective languages mean entropy mean probability",
    "stability": "cosine >= 0.7 features found (others) cosine (others) overlap (others)",
    "sharing": "sharing: nothing to compare (params.yaml: sharing.groups is 0)",
    "switching": "switch to cost switched stayed effect host alone",
    "identify": "texts method accuracy macro F1 McNemar p",
    "ablate": "ablated own dNLL largest other dNLL own - control (95 %) own - others, less the control's",
    "baselines": "method trained on evaluated on languages texts accuracy 95 %",
    "script": "language features letters replaced still fire romanised shuffled script-bound own dNLL romanised",
    "steer": "method harmonic mean from to forcing relevance NLL (nats/token) distinct-2",
    "browse": "hookpoint of one language of several removed alone",
    "explain": "explain: none to explain (params.yaml: explain.endpoint)",
    "report": "page or picture MB",
    "track": "track: state",
}


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A clone of the working tree with small params, its pipeline run once."""
    folder = tmp_path_factory.mktemp("clone")
    clone(folder)
    folder.with_suffix(".log").write_text(run(folder, "dvc", "repro"))
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-q", "-m", "first run")
    return folder


def test_every_contract_of_the_outputs(repo):
    texts = pl.read_parquet(repo / "data/corpus/texts.parquet")
    assert texts.columns == ["text_id", "language", "split", "group", "source", "text"]
    assert texts.group_by("group").agg(pl.col("split").n_unique())["split"].max() == 1
    table = pl.read_parquet(repo / "data/activations/tokens.parquet")
    assert table.columns == ["row", "text_id", "language", "split", "position", "token_id"]
    assert table["row"].to_list() == list(range(len(table)))
    for hookpoint in SMALL["hookpoints"]:
        index = json.loads((repo / f"data/activations/{hookpoint}/index.json").read_text())
        assert index["shape"] == [len(table), 576] and index["hookpoint"] == hookpoint
        dictionary = sae.load(repo / "data/sae", hookpoint)
        assert dictionary.W_dec.shape == (512, 576) and dictionary.W_enc.shape == (576, 512)
        counts = pl.read_parquet(repo / f"data/counts/{hookpoint}.parquet")
        assert counts.columns == ["layer", "unit", "language", "tokens", "texts", "sum", "max", "min_positive"]
        assert counts["tokens"].min() > 0
        totals = pl.read_parquet(repo / f"data/counts/{hookpoint}.totals.parquet")
        train = table.filter(split="train")
        assert totals["tokens"].sum() == len(train) and totals["language"].to_list() == SMALL["languages"]
        assert counts["tokens"].sum() == pytest.approx(16 * len(train), rel=0.01)
    features = pl.read_parquet(repo / "data/scores/features.parquet")
    assert features.columns == [
        "kind", "hookpoint", "layer", "unit", "language", "probability", "entropy", "members", "monolinguality", "rank",
    ]  # fmt: skip
    assert set(features["kind"]) == {"sae"} and len(features) > 0
    nll = pl.read_parquet(repo / "data/ablation/nll.parquet")
    assert nll.columns == [
        "method", "kind", "ablated", "control", "evaluated", "nll", "tokens", "delta", "low", "high",
    ]  # fmt: skip
    assert len(nll) == 3 + 9 + 3 * 2  # clean, every language on every language, two draws of control on each
    recovered = pl.read_parquet(repo / "data/quality/loss_recovered.parquet")
    assert len(recovered) == 2 * (1 + 3) and recovered["nll_zero"].is_not_null().all()
    found_again = pl.read_parquet(repo / "data/stability/features.parquet")
    assert found_again.columns[:6] == ["hookpoint", "unit", "language", "partner", "cosine", "overlap"]
    compared = features.filter(pl.col("hookpoint").is_in(SMALL["stability.hookpoints"]))
    assert found_again.select("hookpoint", "unit", "language").equals(compared.select("hookpoint", "unit", "language"))
    assert sae.load(repo / "data/sae_again/1000", "layers.26.mlp").latents == 512
    predictions = pl.read_parquet(repo / "data/identify/predictions.parquet")
    assert predictions.columns == ["text_id", "language", "method", "normalize", "predicted", "score"]
    assert set(predictions["method"]) == {"sae-count", "sae-min-max", "fasttext"}
    generated = pl.read_parquet(repo / "data/steer/generations.parquet")
    steered = set(SMALL["languages"]) - set(SMALL["steer.prompt_languages"])  # no prompt is in the steered language
    assert set(generated["language"].drop_nulls()) == steered
    browsed = pl.read_parquet(repo / "data/browse/features.parquet")
    assert features.join(browsed, on=["hookpoint", "layer", "unit"], how="anti").is_empty()
    assert browsed.filter(kind="shared").height <= 20 and browsed["delta"].is_not_null().any()
    shown = pl.read_parquet(repo / "data/browse/texts.parquet").join(texts, on="text_id")
    assert len(shown) and all(t.startswith("".join(p)) for p, t in shown.select("pieces", "text").iter_rows())
    assert {path.name for path in (repo / "reports").iterdir()} >= {"report.html", "features.html"}


def test_every_stage_closes_with_what_it_found_and_writes_no_control_sequences(repo):
    log = repo.with_suffix(".log").read_text()
    assert "\x1b" not in log and "\r" not in log
    _, *parts = re.split(r"Running stage '(\w+)[^']*':\n", log)
    stages = dict(zip(parts[::2], parts[1::2], strict=True))
    assert stages.keys() == CLOSING.keys()
    for name, said in stages.items():
        lines = said.splitlines()
        head = next((i for i, line in enumerate(lines) if " ".join(line.split()).startswith(CLOSING[name])), None)
        assert head is not None, f"{name}: {said}"
        if not lines[head].startswith(name):
            assert len(lines[head + 1]) == len(lines[head]), f"{name}: {said}"  # aligned on the right


def test_the_figures_make_sense(repo):
    def metrics(name):
        return json.loads((repo / f"metrics/{name}.json").read_text())

    assert metrics("extract")["padding_share"] < 0.05
    assert metrics("train.layers.26.mlp")["fvu"] < 0.8
    assert metrics("ablate")["own"] > metrics("ablate")["others_abs"]
    assert 3 < metrics("ablate")["nll_clean/en"] < 8


def test_the_library_runs_as_the_page_has_it(repo):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 20
    hookpoint = "layers.14.post_feedforward_layernorm"  # of the default
    assert code.count(hookpoint) == 1
    code = code.replace(hookpoint, "layers.26.mlp")
    printed = [
        line.split() for line in run(repo, sys.executable, "-c", code).splitlines() if line.endswith("nats/token")
    ]
    change = {name: float(value) for name, _, value, _ in printed}
    assert set(change) == {"en", "tr"} and int(printed[0][1]) > 0
    assert change["tr"] > 0 and change["tr"] > 10 * abs(change["en"])


def test_a_second_repro_computes_nothing_and_makes_no_run(repo):
    before = runs(repo)
    assert before == [("summary", "FINISHED")] + [("training", "FINISHED")] * 2
    assert ran(dvc(repo, "repro")) == ["track"]
    assert runs(repo) == before


def text_of(path):
    """What is written in a file, that in the compressed columns of a Parquet file included."""
    text = path.read_bytes().decode("utf-8", "ignore")
    if path.suffix == ".parquet":
        text += json.dumps(pl.read_parquet(path).select(pl.col(pl.String).unique().implode()).to_dicts())
    return text


def test_nothing_volatile_is_in_an_output(repo):
    with sqlite3.connect(repo / "mlflow.db") as database:
        ids = {value for (value,) in database.execute("select run_uuid from runs")}
    now = datetime.date.today()
    days = {
        (now + datetime.timedelta(days=back)).strftime(form) for back in (0, -1) for form in ("%Y-%m-%d", "%d.%m.%Y")
    }
    places = {str(repo), str(Path.home()), tempfile.gettempdir() + "/", sys.prefix}
    volatile = ids | days | places | {run(repo, "git", "rev-parse", "HEAD").strip()}
    if len(host := socket.gethostname()) > 6:  # a shorter one stands in pictures by chance
        volatile.add(host)
    assert len(ids) == 3
    files = [path for out in hashes(repo) for path in [repo / out, *(repo / out).rglob("*")] if path.is_file()]
    assert len(files) > 50
    found = {(str(path.relative_to(repo)), word) for path in files for word in volatile if word in text_of(path)}
    assert not found


def test_no_secret_of_the_environment_is_written_anywhere(repo):
    assert CANARY not in repo.with_suffix(".log").read_text()
    files = [path for path in repo.rglob("*") if path.is_file()]
    assert any("mlruns" in path.parts for path in files) and repo / "mlflow.db" in files
    assert not [path for path in files if CANARY.encode() in path.read_bytes() and path.name != "clone.py"]


def test_verify_finds_a_flipped_byte_in_every_file_of_every_output(repo):
    assert "all as they were written" in run(repo, "python", "-m", "babelscope", "verify")
    before, flipped = hashes(repo), {}
    for out in before:
        place = repo / out
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file() and path.stat().st_size:
                content, times = path.read_bytes(), path.stat()
                middle = len(content) // 2
                path.unlink()  # it may be a hard link to the cache
                path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a disk does that forgets a bit
                flipped[path.relative_to(repo)] = content
    assert len(flipped) > 50
    found, outputs = verify.changed(repo)
    assert set(found) == set(flipped) and outputs == len(before)
    for path in flipped:
        (repo / path).unlink()
    dvc(repo, "checkout")
    for path, content in flipped.items():
        if not (repo / path).exists():  # metrics: in git, not in DVC's cache
            (repo / path).write_bytes(content)
    assert verify.changed(repo) == ([], outputs)
    cached = next(path for path in (repo / verify.CACHE).glob("*/*") if path.stat().st_size)
    content, mode = cached.read_bytes(), cached.stat().st_mode
    cached.chmod(0o644)
    cached.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert str(cached.relative_to(repo)) in run(repo, "python", "-m", "babelscope", "verify", ok=False)
    cached.write_bytes(content)
    cached.chmod(mode)


def test_a_score_threshold_runs_score_and_what_follows_and_back_is_free(repo):
    first = hashes(repo)
    set_params(repo, {"score.ratio": 0.3})
    assert sorted(ran(dvc(repo, "repro"))) == sorted(["score", *AFTER_SCORE])
    # Readable: only the summary's figures, on a line that a wide terminal shows; in `exp show`, they come first.
    shown = dvc(repo, "metrics", "show").splitlines()
    assert "dnll_own" in shown[0] and len(shown) == 2 and max(map(len, shown)) <= 240
    assert "features" in dvc(repo, "metrics", "diff")
    assert "score.ratio" in dvc(repo, "params", "diff")
    columns = dvc(repo, "exp", "show", "--csv").splitlines()[0].split(",")
    figures = json.loads((repo / "metrics/summary.json").read_text())
    assert columns[5 : 5 + len(figures)] == list(figures) and len(columns) < 250
    command = ["exp", "show", "--only-changed", "--drop", "data|src|stages|metrics|reports", "--csv"]
    changed = set(dvc(repo, *command).splitlines()[0].split(","))
    assert {"features", "score.ratio"} <= changed and not any("/" in column for column in changed)
    for command in ("diff", "show"):
        page = dvc(repo, "plots", command, "--out", "plots").strip().removeprefix("file://")
        drawn = Path(page).read_text()
        for shown in ("features_by_layer.csv", "ablation.csv", "training.csv"):
            assert shown in drawn, shown
        assert "vegaEmbed" in drawn and "jsdelivr" not in drawn  # our page, not DVC's: nothing is fetched
        shutil.rmtree(repo / "plots")
    assert runs(repo) == [("summary", "FINISHED")] * 2 + [("training", "FINISHED")] * 2
    set_params(repo, {"score.ratio": 0.5})
    assert ran(dvc(repo, "repro")) == ["track"]
    assert hashes(repo) == first
    assert len(runs(repo)) == 4


def test_a_new_hookpoint_trains_one_sae_only_and_changes_no_other(repo):
    before = hashes(repo)
    set_params(repo, {"hookpoints": [*SMALL["hookpoints"], "layers.29.mlp"]})
    done = ran(dvc(repo, "repro", "encode", "prune"))  # what follows: test_invalidation.py
    assert sorted(done) == ["encode@layers.29.mlp", "extract", "prune", "stream", "train@layers.29.mlp"]
    now, written = hashes(repo), {"data/activations", "data/hookpoints.json", "metrics/extract.json"}
    assert {path for path in before if now[path] != before[path]} == written
    assert sae.load(repo / "data/sae", "layers.29.mlp").latents == 512
    set_params(repo, {"hookpoints": SMALL["hookpoints"]})
    assert ran(dvc(repo, "repro")) == ["prune", "track"]
    assert not list(repo.glob("*/*layers.29*")) and not list(repo.glob("data/*/*layers.29*"))


def test_a_lost_database_is_rebuilt(repo):
    for path in repo.glob("mlflow.db*"):
        path.unlink()
    assert ran(dvc(repo, "repro")) == ["track"]
    assert runs(repo) == [("summary", "FINISHED")] + [("training", "FINISHED")] * 2


def test_a_language_more_trains_nothing(repo):
    before, languages = hashes(repo), SMALL["languages"]
    set_params(repo, {"languages": [*languages, "fi"], "corpus.train_languages": languages})
    assert sorted(ran(dvc(repo, "repro", "score"))) == ["extend", "neurons", "sample", "score", "stream"]
    kept = ("data/activations", "data/corpus/train", "data/encoded", "data/sae")
    assert [path for path, md5 in hashes(repo).items() if path.startswith(kept) and md5 != before[path]] == []
    totals = pl.read_parquet(repo / f"data/counts/{SMALL['hookpoints'][0]}.totals.parquet")
    assert totals["language"].to_list() == [*languages, "fi"] and totals["tokens"].min() > 1000
    set_params(repo, {"languages": languages, "corpus.train_languages": None})
    assert ran(dvc(repo, "repro")) == ["track"]
    assert hashes(repo) == before


def test_without_stored_activations_the_outputs_are_the_same_files(repo):
    before = hashes(repo)
    listed = {path.relative_to(repo) for path in (repo / "data").rglob("*") if path.suffix == ".safetensors"}
    set_params(repo, {"train.source": "stream", "stability.hookpoints": []})
    done = ran(dvc(repo, "repro", "identify"))
    assert {"extract", "stream", "train@layers.26.mlp", "encode@layers.26.mlp", "identify"} <= set(done)
    assert not list((repo / "data/activations").rglob("*.safetensors"))
    for hookpoint in SMALL["hookpoints"]:
        assert sae.load(repo / "data/sae", hookpoint).latents == 512
        stored = json.loads((repo / f"metrics/train.{hookpoint}.json").read_text())
        assert 0 < stored["fvu"] < 0.8
    assert hashes(repo).keys() == before.keys()
    set_params(repo, {"train.source": "stored", "stability.hookpoints": SMALL["stability.hookpoints"]})
    assert ran(dvc(repo, "repro")) == ["prune", "track"]  # DVC's run cache has all of it
    assert {path.relative_to(repo) for path in (repo / "data").rglob("*") if path.suffix == ".safetensors"} == listed


def test_neurons_run_beside_the_features_and_change_none_of_them(repo):
    def rows(name):
        return pl.read_parquet(repo / f"data/{name}.parquet")

    names = ["scores/features", "identify/predictions", "ablation/nll", "ablation/by_layer"]
    before, alone = hashes(repo), {name: rows(name) for name in names}
    places = ["layers.20.mlp.act_fn", "layers.26.mlp.act_fn"]
    set_params(repo, {"neurons.hookpoints": places, "ablate.methods": ["feature", "neuron"]})
    done = ran(dvc(repo, "repro", "identify", "ablate"))
    assert sorted(done) == ["ablate", "identify", "neurons", "score"]
    totals = rows("neurons/totals")
    assert totals.equals(rows(f"counts/{SMALL['hookpoints'][0]}.totals"))
    for place in places:
        counts = rows(f"neurons/{place}").join(totals, on="language", suffix="_all")
        assert counts["unit"].max() == 1535 and counts.select((pl.col("tokens") <= pl.col("tokens_all")).all()).item()
    neurons = rows("scores/features").filter(kind="neuron")
    assert set(neurons["hookpoint"]) <= set(places) and set(neurons["language"]) <= set(SMALL["languages"])
    assert neurons.select("hookpoint", "unit").n_unique() == round(0.01 * 2 * 1536)
    assert rows("scores/features").filter(kind="sae").equals(alone["scores/features"])
    predicted = rows("identify/predictions")
    assert predicted.filter(pl.col("method") != "neuron-count").equals(alone["identify/predictions"])
    assert predicted.filter(method="neuron-count", normalize="units").height == predicted["text_id"].n_unique()
    for name in ("ablation/nll", "ablation/by_layer"):
        assert rows(name).filter(method="feature").equals(alone[name])
        assert rows(name).filter(method="neuron", kind="neuron").height == len(alone[name])
    effect = json.loads((repo / "metrics/ablate.json").read_text())
    assert effect["neuron/own"] != 0 and "neuron/languages_above_control" in effect
    set_params(repo, {"neurons.hookpoints": [], "ablate.methods": ["feature"]})
    assert ran(dvc(repo, "repro")) == ["track"]
    assert hashes(repo) == before


def warm_repro(folder, log):
    log.write_bytes(b"")
    return warm.Process(["dvc", "repro"], folder, environment(), log)


def test_a_run_from_nothing_that_is_killed_again_and_again_gives_the_same_bytes(repo, tmp_path):
    again = tmp_path / "again"
    run(repo, "git", "clone", "-q", ".", str(again))
    # Seconds of work; tools/kills.py kills while packages are imported, too. A moment that comes after the end of its
    # stage kills the next one. `ablate` takes longest, so it is killed twice.
    moments = {"sample": [0.5], "extract": [1.0], "train@layers.20.mlp": [0.6], "train@layers.26.mlp": [0.9]}
    moments |= {"ablate": [1.0, 3.0], "report": [0.3]}
    done = kills.ride(again, moments, itertools.cycle(kills.VICTIMS), kills.digests(repo), start=warm_repro)
    assert len(done) == 7
    assert hashes(again).items() <= hashes(repo).items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hookpoints": ["layers.99.mlp"], "stability.hookpoints": [], "steer.hookpoints": []},
            "the model has no 'layers.99.mlp'; nearest: layers.",
        ),
        ({"languages": ["en", "xx"]}, "xx"),
        ({"train.source": "stream"}, "params.yaml: stability.hookpoints: a second training reads stored activations"),
        ({"train.k": "many"}, "params.yaml: train.k: input should be a valid integer, got 'many'"),
    ],
)
def test_bad_params_end_with_one_message_before_any_long_work(repo, changes, message):
    before = (repo / "params.yaml").read_text()
    try:
        set_params(repo, changes)
        text = script(repo, f"stages/{'extract' if 'hookpoints' in changes else 'sample'}.py", ok=False)
        assert text.startswith("error: ") or "\nerror: " in text
        assert message in text
    finally:
        (repo / "params.yaml").write_text(before)
