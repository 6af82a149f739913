"""The stage `sharing`: latents that fire on a text and on its translations."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from closure import ROOT

from babelscope import config
from babelscope.activations import store
from babelscope.core.errors import UserError
from babelscope.core.paths import Paths
from babelscope.features import run_sharing, sharing, typology
from babelscope.sae import checkpoint
from babelscope.sae.autoencoder import SAE

LANGUAGES, HOOKPOINT = ["en", "de", "fi"], "layers.1.mlp"


def test_the_groups_in_most_languages_are_taken_with_one_text_of_each() -> None:
    rows = [("e1", "en", "g1"), ("d1", "de", "g1"), ("d0", "de", "g1"), ("e2", "en", "g2"), ("e3", "en", "g3"),
            ("d3", "de", "g3"), ("f3", "fi", "g3"), ("x3", "xx", "g3")]  # fmt: skip
    texts = pl.DataFrame(rows, schema=["text_id", "language", "group"], orient="row")
    assert sharing.parallel_texts(texts, LANGUAGES, 9)["text_id"].to_list() == ["e1", "d0", "e3", "d3", "f3"]
    assert sharing.parallel_texts(texts, LANGUAGES, 1)["text_id"].to_list() == ["e3", "d3", "f3"]


def test_overlaps_by_hand() -> None:
    fires = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=bool)
    texts = pl.DataFrame({"language": ["en", "de", "en", "de", "fi", "fi"], "group": ["a", "a", "b", "b", "a", "c"]})
    found = sharing.overlaps(fires, texts, LANGUAGES)
    # Finnish has only one group in common with each of the others. Translations: 1/2 and 1; random pairs: 0 and 0.
    assert found.rows() == [("en", "de", 2, 0.75, 0.0)]


def test_the_first_component_of_vectors_by_hand() -> None:
    assert sharing.first_component(np.array([[1.0, -1, 0], [2, -2, 0]])) == pytest.approx(1.0)
    # Four vectors with DiffMeans of +-a and +-b, a and b orthogonal with mean 0: two equal eigenvalues.
    a, b = np.array([1.0, -1, 0, 0]), np.array([0.0, 0, 1, -1])
    assert sharing.first_component(np.array([a, -a, b, -b])) == pytest.approx(0.5)
    assert np.isnan(sharing.first_component(np.ones((1, 3))))


def test_typological_distance_by_hand(tmp_path: Path) -> None:
    data = np.zeros((3, 2, 1), dtype=np.float32)
    data[0, 0], data[1, 1], data[2, :] = 2, 1, 1
    path = tmp_path / "features.npz"
    np.savez(path, data=data, langs=np.array(["deu", "cmn", "ekk"]), feats=np.array(["S_A", "S_B"]))
    found = typology.distances(["de", "zh-CN", "et", "fi"], path)
    assert found is not None
    assert found[0, 1] == pytest.approx(1.0)
    assert found[0, 2] == found[1, 2] == pytest.approx(1 - 0.5**0.5)
    assert np.isnan(found[3]).all()


def test_rank_correlation() -> None:
    assert sharing.rank_correlation(pl.Series([1.0, 2, 9, 7]), pl.Series([0.1, 0.2, 0.4, None])) == pytest.approx(1.0)
    assert sharing.rank_correlation(pl.Series([1.0, 2]), pl.Series([1.0, 2])) is None
    assert sharing.rank_correlation(pl.Series([1.0, 2, 3]), pl.Series([1.0, 1, 1])) is None


def lay_out(folder: Path, groups: int) -> tuple[config.Config, Paths]:
    """Two groups in three languages, two tokens a text; latent 0 or 1 fires by group, 2 to 4 by language."""
    d, n = 8, 5
    place = folder / "data/activations" / HOOKPOINT
    place.mkdir(parents=True)
    (folder / "data/corpus").mkdir(parents=True)
    texts, rows, x = [], [], []
    for number, (group, language) in enumerate((g, name) for g in range(2) for name in LANGUAGES):
        texts.append((f"t{number}", language, "train", f"g{group}", "", ""))
        rows += [(2 * number + i, f"t{number}", language, "train", i, 0) for i in range(2)]
        x += [torch.eye(d)[group], torch.eye(d)[2 + LANGUAGES.index(language)]]
    names = ["text_id", "language", "split", "group", "source", "text"]
    pl.DataFrame(texts, schema=names, orient="row").write_parquet(folder / "data/corpus/texts.parquet")
    tokens = ["row", "text_id", "language", "split", "position", "token_id"]
    pl.DataFrame(rows, schema=tokens, orient="row").write_parquet(folder / "data/activations/tokens.parquet")
    store.write_shard(place, 0, torch.stack(x).half())
    store.write_index(place, [len(x)], d, "float16", "m", HOOKPOINT)
    sae = SAE(torch.eye(n, d), torch.eye(n, d), torch.zeros(n), torch.zeros(d), 1)
    checkpoint.save(sae, folder / "data/sae" / HOOKPOINT, {"model_name": "m", "hook_name": HOOKPOINT})
    content = config.read_yaml(ROOT / "params.yaml") | {"languages": LANGUAGES, "hookpoints": [HOOKPOINT]}
    content["stability"] |= {"hookpoints": []}
    content["steer"] |= {"hookpoints": []}
    content["sharing"] = {"groups": groups}
    return config.parse(content), Paths(folder)


def test_the_stage_by_hand(tmp_path: Path) -> None:
    params, paths = lay_out(tmp_path, 5)
    run_sharing.run(params, paths)
    table = pl.read_parquet(paths.sharing)
    assert table.select("language", "other").rows() == [("en", "de"), ("en", "fi"), ("de", "fi")]
    # {group, language} of each text: translations share one of three latents, random pairs none.
    assert table["translations"].to_list() == pytest.approx([1 / 3] * 3)
    assert table["random"].to_list() == [0.0] * 3
    numbers = json.loads(paths.metrics("sharing").read_text())
    assert numbers["groups"] == 2
    assert numbers["texts"] == 6
    assert numbers[f"jaccard_translations/{HOOKPOINT}"] == pytest.approx(1 / 3)
    # The DiffMeans of three languages are symmetric: correlations of -1/2, eigenvalues of 3/2, 3/2 and 0.
    assert numbers[f"first_component/{HOOKPOINT}"] == pytest.approx(0.5)


def test_without_groups_there_is_an_empty_table(tmp_path: Path) -> None:
    params, paths = lay_out(tmp_path, 0)
    run_sharing.run(params, paths)
    assert pl.read_parquet(paths.sharing).schema == run_sharing.SCHEMA
    assert json.loads(paths.metrics("sharing").read_text()) == {}


def test_a_corpus_without_translations_is_refused(tmp_path: Path) -> None:
    params, paths = lay_out(tmp_path, 3)
    texts = pl.read_parquet(paths.texts)
    texts.with_columns(group=pl.col("text_id")).write_parquet(paths.texts)
    with pytest.raises(UserError, match="sharing.groups: .* no text in two languages"):
        run_sharing.run(params, paths)
