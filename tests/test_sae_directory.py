"""SAELens' directory of releases: what `sae-lens:<release>/<id>` names, and what of it can be loaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import released_saes
from closure import ROOT
from release_files import N, write_gemma_scope_2

from babelscope.core.errors import UserError
from babelscope.sae import directory
from babelscope.sae.checkpoint import load

DIRECTORY = """
gemma-scope-2-270m-pt-res: {conversion_func: gemma_3, repo_id: google/x, model: m, saes: [
  {id: layer_3_l0_small, path: resid_post/layer_3_width_16k_l0_small}, {id: a/b, path: c/d}]}
sweep_gated_ctx128: {conversion_func: dictionary_learning_1, repo_id: x/y, model: m, saes: [{id: a, path: a}]}
mistral: {conversion_func: null, repo_id: x/z, model: m, saes: [{id: a, path: a}],
  config_overrides: {normalize_activations: constant_norm_rescale}}
clt: {conversion_func: mntss_clt_layer_transcoder, repo_id: x/clt, model: m, saes: [{id: layer_0, path: 0}]}
new: {conversion_func: of_2027, repo_id: x/new, model: m, saes: [{id: a, path: a}]}
"""


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package sae_lens with a small directory."""
    package = tmp_path / "site/sae_lens"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it must not be imported')")
    (package / "pretrained_saes.yaml").write_text(DIRECTORY)
    monkeypatch.syspath_prepend(str(package.parent))
    directory.read.cache_clear()
    yield tmp_path
    directory.read.cache_clear()


def test_an_entry_of_saelens_directory_is_loaded_from_its_repository(
    listed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, "resid_post/layer_3_width_16k_l0_small/params.safetensors" in allow_patterns))
        return str(listed / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    write_gemma_scope_2(listed / "hub/resid_post/layer_3_width_16k_l0_small")
    release = "sae-lens:gemma-scope-2-270m-pt-res"
    for sae in (load(release, "layer_3_l0_small", revision="abc"), load(f"{release}/layer_3_l0_small", "x")):
        assert sae.latents == N and not sae.is_transcoder
    assert asked == [("google/x", "abc", True), ("google/x", None, True)]
    assert directory.resolve(f"{release}/a/b") == ("google/x", "c/d")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma-scope-2-270m-pt-rse/a", "has no release 'gemma-scope-2-270m-pt-rse'; allowed: .*did you mean"),
        ("gemma-scope-2-270m-pt-res/layer_4", "the release has no SAE 'layer_4'; allowed: a/b, layer_3_l0_small"),
        ("sweep_gated_ctx128/a", "'a' cannot be loaded: gated SAEs"),
        ("mistral/a", "'a' cannot be loaded: the input is normalised by a factor"),
        ("clt/layer_0", "'layer_0' cannot be loaded: one layer of a cross-layer transcoder"),
        ("new/a", "'a' cannot be loaded: a format that is not known here, 'of_2027'"),
    ],
)
def test_an_entry_that_cannot_be_loaded_is_named(listed: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"sae-lens:{name}: .*{message}"):
        load(f"sae-lens:{name}")


def test_the_directory_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "find_spec", lambda name: None)
    directory.read.cache_clear()
    with pytest.raises(UserError, match="the package sae-lens, which is not installed; pip install --no-deps sae-lens"):
        directory.resolve("sae-lens:x/y")


def test_the_documented_count_is_that_of_the_directory() -> None:
    """Of the version that docs/pretrained.md names, where `make bench` has installed it."""
    found = sorted((ROOT / ".bench/sae-lens").glob("lib/python3*/site-packages/sae_lens/pretrained_saes.yaml"))
    if not found:
        pytest.skip("no environment of sae-lens: `make .bench/sae-lens/.ready` sets it up")
    assert released_saes.table(found[0]) in (ROOT / "docs/pretrained.md").read_text()
