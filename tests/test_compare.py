"""`babelscope compare`: two SAEs of a hookpoint, and two states of the repository."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch.nn import functional

from babelscope import cli
from babelscope.compare import command, figures, page, saes, states
from babelscope.compare.figures import Block, Value
from babelscope.core.errors import UserError
from babelscope.core.paths import Paths
from babelscope.report.verdict import wilson
from babelscope.sae.autoencoder import SAE
from babelscope.sae.checkpoint import save


def dictionary(seed: int, latents: int = 24, d: int = 16) -> SAE:
    draw = torch.Generator().manual_seed(seed)
    rows = functional.normalize(torch.randn(latents, d, generator=draw))
    return SAE(rows.clone(), rows, torch.zeros(latents), torch.zeros(d), 3)


def shuffled(first: SAE, kept: int) -> SAE:
    """Another order of the same latents, of which all but `kept` are replaced by random ones."""
    other, order = (
        dictionary(9, first.latents, first.d),
        torch.randperm(first.latents, generator=torch.Generator().manual_seed(1)),
    )
    encoder, decoder = other.encoder.detach().clone(), other.W_dec.detach().clone()
    encoder[:kept], decoder[:kept] = first.encoder.detach()[:kept], 3 * first.W_dec.detach()[:kept]
    return SAE(encoder[order], decoder[order], torch.zeros(first.latents), torch.zeros(first.d), 3)


def test_the_latents_in_common_are_found_whatever_their_order_and_norm() -> None:
    first = dictionary(0)
    same = saes.common(first, shuffled(first, 24), 0.7)
    assert same.matched == 1.0 and same.pw_mcc == pytest.approx(1.0) == same.encoder
    assert same.matched_chance < 0.2 and same.pw_mcc_chance < 0.7
    assert (same.latents, same.others, same.features) == (24, 24, None)
    half = saes.common(first, shuffled(first, 12), 0.95, units=[0, 1, 23])
    assert half.matched == pytest.approx(0.5) and half.features == pytest.approx(2 / 3)
    # The encoder counts as well as the decoder.
    turned = SAE(-first.encoder.detach(), first.W_dec.detach(), torch.zeros(24), torch.zeros(16), 3)
    opposite = saes.common(first, turned, 0.7)
    assert opposite.matched == 0.0 and opposite.pw_mcc == pytest.approx(1.0) and opposite.encoder == pytest.approx(-1.0)
    with pytest.raises(UserError, match=r"different widths \(\[16\] -> \[16\] and \[8\] -> \[8\]\)"):
        saes.common(first, dictionary(0, d=8), 0.7)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("layers.2.mlp", "layers.10.mlp", "layers.3.mlp"):
        save(dictionary(0), Path("data/sae") / name, {"model_name": "m", "hook_name": name})
    for name in ("layers.10.mlp", "layers.2.mlp"):
        save(shuffled(dictionary(0), 12), Path("other") / name, {"model_name": "m", "hook_name": name})
    return tmp_path


def test_folders_are_compared_at_the_hookpoints_that_both_have(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = {"kind": ["sae"] * 3, "hookpoint": ["layers.2.mlp"] * 3, "unit": [0, 1, 23], "language": ["en"] * 3}
    Path("data/scores").mkdir()
    pl.DataFrame(features).write_parquet("data/scores/features.parquet")
    cli.main(["compare", "data/sae", "other", "--cosine", "0.95"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "data/sae against other" and lines[2].endswith("language features matched")
    rows = [line.split() for line in lines[3:5]]
    assert [row[0] for row in rows] == ["layers.2.mlp", "layers.10.mlp"]
    assert rows[0][1:4] == ["24", "24", "0.500"] and rows[0][-2] == "0.667" and rows[1][-1] == "–"
    cli.main(["compare", "data/sae", "other", "--hookpoint", "layers.10.mlp"])
    assert "layers.2.mlp" not in capsys.readouterr().out
    assert "language features" not in saes.table("other", "data/sae", [], 0.7, Paths())
    assert saes.chosen("data/sae", "other", ["layers.3.mlp"]) == ["layers.3.mlp"]
    assert saes.chosen("data/sae/layers.2.mlp", "other/layers.10.mlp", []) == [""]
    assert saes.chosen("data/sae/layers.2.mlp", "owner/name", []) == [""]
    assert saes.chosen("data/sae", "owner/name", []) == ["layers.2.mlp", "layers.3.mlp", "layers.10.mlp"]
    shutil.rmtree("other/layers.2.mlp")
    shutil.rmtree("data/sae/layers.10.mlp")
    with pytest.raises(UserError, match="no hookpoint in common: layers.2.mlp, layers.3.mlp; layers.10.mlp; --hook"):
        saes.chosen("data/sae", "other", [])


def test_the_interval_of_a_share_is_wilsons() -> None:
    # 81 of 263: Newcombe 1998, table I, gives 0.2553 to 0.3662.
    assert [round(end, 4) for end in wilson(81 / 263, 263)] == [0.2553, 0.3662]
    for share in (0.0, 1.0):
        low, high = wilson(share, 20)
        assert 0 <= low < high <= 1
    assert figures.apart((Value(1, 0.5, 1.5), Value(2, 1.6, 2.5))) is True
    assert figures.apart((Value(1, 0.5, 1.6), Value(2, 1.6, 2.5))) is False
    assert figures.apart((Value(1, 0.5, 1.5), Value(2))) is None is figures.apart((None, Value(2, 1, 3)))


PARAMS: dict[str, Any] = {
    "languages": ["en", "tr"], "hookpoints": ["layers.5.mlp", "layers.10.mlp"], "model": {"name": "me/small"},
    "steer": {"prompts": 4}, "train": {"k": 8},
}  # fmt: skip


def write_state(root: Path, own: float, params: dict[str, Any], layers: int | None = 20) -> None:
    metrics = {
        "extract": {"layers": layers} if layers else {},
        "score": {"features": 30, "features/en": 10, "features/tr": 20, "effective_languages_median/en": 1.5},
        "ablate": {"primary_method": "swap", "own": own}
        | {"dnll_own/en": own, "dnll_own/tr": 2 * own, "own_alone/layers.10.mlp": own / 2},
        "identify": {"accuracy/sae-count/units": 0.9, "accuracy/fasttext/none": 0.95, "texts": 100},
        "stability": {"features_matched_share/en": 0.5, "stability_features/en": 10, "write_cosine/tr": 0.9},
        "steer": {"best_harmonic": 0.5, "harmonic/pca": 0.5, "harmonic_low/pca": 0.25, "harmonic_high/pca": 0.75},
        "train.layers.5.mlp": {"fvu": 0.1},
    }
    (root / "metrics").mkdir(exist_ok=True)
    for name, content in metrics.items():
        (root / f"metrics/{name}.json").write_text(json.dumps(content))
    (root / "params.yaml").write_text(json.dumps(params))
    (root / "data/ablation").mkdir(parents=True, exist_ok=True)
    # Without a method `feature`, the first of params.yaml is shown, here the last one by name.
    rows = [("swap", "en", own), ("swap", "tr", 2 * own), ("mean", "en", 9 * own), ("mean", "tr", 9 * own)]
    pl.DataFrame({
        "method": [method for method, *_ in rows], "control": pl.Series([None] * 4, dtype=pl.Int32),
        "ablated": [name for _, name, _ in rows],
        "evaluated": [name for _, name, _ in rows], "delta": [delta for *_, delta in rows],
        "low": [0.9 * delta for *_, delta in rows], "high": [1.1 * delta for *_, delta in rows],
    }).write_parquet(root / "data/ablation/nll.parquet")  # fmt: skip


def git(root: Path, *arguments: str) -> str:
    options = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", "-C", str(root), *options, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A committed state, whose table is in DVC's cache, and another in the working folder."""
    root = tmp_path_factory.mktemp("states") / "repo"
    root.mkdir()
    git(root, "init", "-q")
    write_state(root, 0.5, PARAMS)
    for arguments in (["init", "-q"], ["add", "-q", "data/ablation"]):
        subprocess.run(["dvc", *arguments], cwd=root, check=True, capture_output=True)
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "first")
    write_state(root, 1.5, PARAMS | {"train": {"k": 16}}, layers=40)
    return root


@pytest.fixture
def repo(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "repo"
    shutil.copytree(template, root)
    monkeypatch.chdir(root)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return root


def test_a_revision_is_read_without_touching_the_working_folder(repo: Path) -> None:
    before = {path: path.read_bytes() for path in (repo / "metrics").iterdir()}
    first, second = states.read("HEAD", repo), states.read("workspace", repo)
    assert first.commit == git(repo, "rev-parse", "HEAD") and second.commit == ""
    assert first.figure("ablate", "own") == 0.5 and second.figure("ablate", "own") == 1.5
    assert first.nll is not None and first.nll["delta"].to_list() == [0.5, 1.0, 4.5, 4.5]
    assert figures.own_effects(second)["tr"] == Value(3.0, 2.7, 3.3000000000000003)
    assert {path: path.read_bytes() for path in (repo / "metrics").iterdir()} == before
    assert figures.changed(first, second) == [("train.k", "8", "16")]


def test_an_experiment_is_found_by_its_name(repo: Path) -> None:
    head = git(repo, "rev-parse", "HEAD")
    git(repo, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/wide-k", head)
    assert states.resolve("wide-k", repo) == head == states.resolve("HEAD", repo)
    assert states.resolve("wide", repo) is None is states.resolve("--all", repo)
    git(repo, "commit", "-q", "--allow-empty", "-m", "second")
    git(repo, "update-ref", f"refs/exps/aa/{head[2:]}/wide-k", "HEAD")
    with pytest.raises(UserError, match="wide-k: 2 experiments have this name"):
        states.resolve("wide-k", repo)


def test_pairs_have_intervals_and_are_placed_by_relative_depth(repo: Path) -> None:
    found = {block.id: block for block in figures.blocks(states.read("HEAD", repo), states.read("workspace", repo))}
    assert list(found) == ["features", "specificity", "ablation", "identification", "stability", "sets", "steering",
                           "own_alone", "fvu"]  # fmt: skip
    assert found["ablation"].rows["en"] == (Value(0.5, 0.45, 0.55), Value(1.5, 1.35, 1.6500000000000001))
    assert found["identification"].rows["fasttext/none"][0] == Value(0.95, *wilson(0.95, 100))
    assert found["stability"].rows["en"][1] == Value(0.5, *wilson(0.5, 10))
    assert found["stability"].rows["tr"] == (None, None)
    assert found["steering"].rows == {"pca": (Value(0.5, 0.25, 0.75), Value(0.5, 0.25, 0.75))}
    alone = found["own_alone"]
    assert alone.at == {"0.12 layers.5.mlp": 0.125, "0.25 layers.5.mlp": 0.25, "0.25 layers.10.mlp": 0.25,
                        "0.50 layers.10.mlp": 0.5}  # fmt: skip
    assert alone.rows["0.50 layers.10.mlp"] == (Value(0.25), None)
    assert alone.rows["0.25 layers.10.mlp"] == (None, Value(0.75))
    write_state(repo, 1.5, PARAMS, layers=None)
    found = {block.id: block for block in figures.blocks(states.read("HEAD", repo), states.read("workspace", repo))}
    assert found["own_alone"].at == {"layers.5.mlp": 5, "layers.10.mlp": 10} or "layer (a state" in found["fvu"].note


def test_the_page_shows_both_and_needs_nothing_else(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["compare", "HEAD", "workspace", "--html", "out/compare.html"])
    assert capsys.readouterr().out == "out/compare.html\n"
    html = (repo / "out/compare.html").read_text()
    assert "HEAD against workspace" in html and "<script" not in html
    assert not re.search(r"""(src|href|srcset)="(?!data:image/svg|#)""", html)
    assert (
        "workspace is higher than HEAD in 2 of 2 rows and lower in 0; the intervals do not overlap in 2 of 2." in html
    )
    assert "0.500 [0.450, 0.550]" in html and "<td>+1.000</td>" in html
    assert html == page.build(states.read("HEAD", repo), states.read("workspace", repo))


def test_the_page_in_a_browser(repo: Path, chromium: Any) -> None:
    page.main("HEAD", "workspace", Path("compare.html"))
    for width, scheme in ((390, "light"), (1280, "dark")):
        opened = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        noticed: list[str] = []
        opened.on("console", lambda message, noticed=noticed: noticed.append(message.text))
        opened.goto((repo / "compare.html").as_uri())
        sizes = opened.eval_on_selector_all("picture img", "all => all.map(one => [one.naturalWidth, one.width])")
        assert len(sizes) == 9 and all(natural > 100 and shown == natural for natural, shown in sizes)
        assert opened.evaluate("document.documentElement.scrollWidth") <= width and noticed == []
        opened.close()


def test_without_the_table_the_figures_have_no_intervals(repo: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(repo / ".dvc/cache")
    state = states.read("HEAD", repo)
    assert state.nll is None and figures.own_effects(state) == {"en": Value(0.5), "tr": Value(1.0)}
    assert "HEAD: DVC does not have its ablation table here" in caplog.text
    block = Block("a", "A", "unit", "", {"en": (Value(0.5), None)})
    assert page.verdict(block, ["a", "b"]) == "No row has a figure in both states."
    assert page.table(block, ["a", "b"]).rows == [["English (en)", "0.500", "–", "–", "–"]]


def test_what_is_neither_or_not_of_a_kind_is_refused(repo: Path) -> None:
    (repo / "saes").mkdir()
    with pytest.raises(UserError, match="HEAD is a git revision, but saes is no git revision; allowed: two revisions"):
        command.main("HEAD", "saes", [], 0.7, Path("x.html"))
    with pytest.raises(UserError, match="nothing: no git revision, no DVC experiment"):
        states.read("nothing", repo)
    git(repo, "rm", "-rq", "--cached", "metrics")
    git(repo, "commit", "-q", "-m", "without metrics")
    with pytest.raises(UserError, match=r"HEAD: it has no metrics/\*.json"):
        states.read("HEAD", repo)


def test_a_folder_with_the_name_of_a_branch_is_taken_and_told(
    repo: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        git(repo, "branch", name)
        save(dictionary(0), repo / name / "layers.2.mlp", {"model_name": "m", "hook_name": "layers.2.mlp"})
    command.main("one", "two", [], 0.7, Path("x.html"))
    assert "one against two" in capsys.readouterr().out
    for name in ("one", "two"):
        assert f"{name} is a folder and a git revision: the folder is taken (the branch: heads/{name})" in caplog.text
    assert states.resolve("heads/one", repo) == git(repo, "rev-parse", "HEAD")
