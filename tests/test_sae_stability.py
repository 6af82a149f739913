"""Stability: partners and overlaps by hand, an SAE against itself, and the stages `retrain` and `stability`."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from closure import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from babelscope import config
from babelscope.activations import store
from babelscope.core.paths import Paths
from babelscope.features import run_stability, stability
from babelscope.features.stability import (
    Overlap,
    assign,
    match,
    partners,
    random_latents,
    random_sets,
    subspace_overlap,
    with_baseline,
    write_cosine,
)
from babelscope.sae import SAE, checkpoint
from babelscope.sae.training import loop
from babelscope.tracking import prune

HOOKPOINT = "layers.2.mlp"
SHIPPED = config.load(ROOT / "params.yaml")


def test_partners_by_hand() -> None:
    decoder = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    other = torch.tensor([[3.0, 4.0], [0.1, 0.0], [0.0, -1.0]])
    cosine, partner = partners(decoder, other)
    # Cosines with the three others: 0.6, 1, 0; 0.8, 0, -1; -0.6, -1, 0; the row of zeros has 0 with all.
    torch.testing.assert_close(cosine, torch.tensor([1.0, 0.8, 0.0, 0.0]))
    assert partner.tolist() == [1, 0, 2, 0]


def test_partners_in_chunks_are_those_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, other = (torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (10, 7))
    whole = torch.nn.functional.cosine_similarity(decoder[:, None], other[None], dim=-1).max(dim=1)
    sizes: list[int] = []
    monkeypatch.setattr(stability, "chunk_rows", lambda latents, device: sizes.append(latents) or 3)
    cosine, partner = partners(decoder, other)
    torch.testing.assert_close(cosine, whole.values)
    assert torch.equal(partner, whole.indices)
    assert sizes == [7]


def test_overlap_by_hand_and_in_any_chunks() -> None:
    # The first SAE fires {0}, {1, 0}, {1} on the three tokens, the second {3}, {2}, {3}.
    first = torch.tensor([[1.0, 0.0], [2.0, 3.0], [1.0, 0.0]]), torch.tensor([[0, 1], [1, 0], [1, 2]])
    second = torch.ones(3, 1), torch.tensor([[3], [2], [3]])
    for chunk in (1, 2, 3):
        overlap = Overlap(torch.tensor([3, 2, 0]), 4)
        for start in range(0, 3, chunk):
            here = slice(start, start + chunk)
            overlap.add((first[0][here], first[1][here]), (second[0][here], second[1][here]))
        assert overlap.result()[:2].tolist() == [1 / 3, 1 / 2]
        assert overlap.result()[2].isnan()  # neither of the two fires


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_an_sae_finds_itself_in_itself_with_permuted_latents(seed: int, jumprelu: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, d = 48, 12
    encoder, decoder = (torch.randn(n, d, generator=generator) for _ in range(2))
    bias, mean = 0.1 * torch.randn(n, generator=generator), torch.randn(d, generator=generator)
    order = torch.randperm(n, generator=generator)
    kind = {"threshold": torch.full((n,), 0.5)} if jumprelu else {"k": 5}
    one = SAE(encoder, decoder, bias, mean, **kind)  # type: ignore[arg-type]
    same = SAE(encoder[order], decoder[order] * 3.0, bias[order], mean, **kind)  # type: ignore[arg-type]
    cosine, partner = partners(one.W_dec, same.W_dec)
    torch.testing.assert_close(cosine, torch.ones(n))
    assert torch.equal(order[partner], torch.arange(n))
    x, overlap = torch.randn(200, d, generator=generator), Overlap(partner, n)
    overlap.add(one.encode(x), same.encode(x))
    found = overlap.result()
    assert not found.isnan().all() and bool((found[~found.isnan()] == 1).all())


def test_a_feature_stands_beside_the_others_that_fire_at_least_as_often() -> None:
    latents = pl.DataFrame(
        [
            (0, 10, 5, 0.95, 0.5), (1, 20, 4, 0.9, 1.0), (2, 10, 3, 0.5, None), (3, 5, 2, 0.99, 0.25),
            (4, 20, 1, 0.8, 0.5), (5, 30, 0, 1.0, 0.75), (6, 7, 6, 0.2, 0.0),
        ],
        schema=["unit", "tokens", "partner", "cosine", "overlap"], orient="row",
    )  # fmt: skip
    features = pl.DataFrame({"unit": [0, 5, 0, 6], "language": ["tr", "fi", "en", "en"]})
    found = with_baseline(features, latents, 0.9)
    assert found.columns == [
        "unit", "language", "partner", "cosine", "overlap", "others", "others_share", "others_cosine", "others_overlap",
    ]  # fmt: skip
    # Of the latents that are no features, 1 and 4 fire on 20 tokens, 2 on 10 and 3 on 5.
    three = (3, 1 / 3, pytest.approx(2.2 / 3), 0.75)
    assert found.rows() == [
        (0, "tr", 5, 0.95, 0.5, *three),
        (5, "fi", 0, 1.0, 0.75, None, None, None, None),
        (0, "en", 5, 0.95, 0.5, *three),
        (6, "en", 6, 0.2, 0.0, *three),
    ]


def test_latents_are_paired_one_to_one_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Cosines 0, 0.8 and 0.8, 0.96: both latents are nearest to the second, and the largest sum is 0.8 + 0.8.
    decoder = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    other = torch.tensor([[0.0, 2.0], [0.8, 0.6]])
    row, column = assign(decoder, other)
    assert row.tolist() == [0, 1] and column.tolist() == [1, 0]
    encoder = torch.tensor([[0.0, 5.0], [1.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, -1.0]])
    cosines = match((decoder, encoder[0]), (other, encoder[1]))
    torch.testing.assert_close(cosines[0], torch.tensor([0.8, 0.8]))
    torch.testing.assert_close(cosines[1], torch.tensor([-1.0, 0.5**0.5]))
    # Of three latents only two can have a partner.
    three = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.6, 0.8]])
    found, _ = match((three, three), (other, other))
    assert found.isnan().tolist() == [False, True, False]
    monkeypatch.setattr(stability, "_DENSE", 0)
    assert [part.tolist() for part in assign(decoder, other)] == [[0, 1], [1, 0]]
    torch.testing.assert_close(match((three, three), (other, other))[0], found, equal_nan=True)


def test_the_nearest_partners_of_many_latents_give_the_pairs_of_all_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(300, 16, generator=generator)
    other = decoder[torch.randperm(300, generator=generator)] + 0.3 * torch.randn(300, 16, generator=generator)
    row, column = assign(decoder, other)
    monkeypatch.setattr(stability, "_DENSE", 0)
    nearest = dict(zip(*(part.tolist() for part in assign(decoder, other)), strict=True))
    assert len(set(nearest.values())) == len(nearest)
    assert sum(nearest.get(i) == j for i, j in zip(row.tolist(), column.tolist(), strict=True)) >= 297


def test_permuted_latents_are_all_matched_and_random_ones_as_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(2, 12, 12, generator=generator)

    def weights() -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randn(400, 12, generator=generator)
        return rows @ mixing[0] + 1.0, rows @ mixing[1]

    one, unrelated = weights(), weights()
    order = torch.randperm(400, generator=generator)
    for cosine in match(one, one) + match(one, (one[0][order] * 3.0, one[1][order])):
        torch.testing.assert_close(cosine, torch.ones(400))
    (decoder, encoder), (by_chance, chance_encoder) = match(one, unrelated), match(one, random_latents(unrelated, 0))
    assert abs(float((decoder - by_chance).mean())) < 0.02 and float(decoder.mean()) < 0.95
    shares = [
        float(((a >= 0.7) & (b >= 0.7)).float().mean()) for a, b in ((decoder, encoder), (by_chance, chance_encoder))
    ]
    assert 0 < shares[0] < 0.95 and abs(shares[0] - shares[1]) < 0.1
    assert all(torch.equal(a, b) for a, b in zip(random_latents(one, 1), random_latents(one, 1), strict=True))
    assert not torch.equal(random_latents(one, 1)[0], random_latents(one, 2)[0])


def test_random_latents_have_the_mean_and_the_covariance_of_the_given_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(
        torch.randn(3000, 6, generator=generator) @ torch.diag(torch.arange(1.0, 7)) + 2
    )
    drawn = torch.cat(random_latents((rows, rows.flip(1)), 0), dim=1)
    both = torch.cat([rows, rows.flip(1)], dim=1)
    torch.testing.assert_close(drawn.mean(0), both.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), both.T.cov(), atol=0.02, rtol=0)


def test_write_cosine_and_subspace_overlap_by_hand() -> None:
    rows, sums = torch.eye(3)[:2], torch.tensor([3.0, 4.0])
    assert write_cosine((rows, sums), (rows.flip(0) * 2, sums.flip(0))) == pytest.approx(1)
    # (3, 4, 0) and (0, 4, 3): 16 / 25.
    assert write_cosine((rows, sums), (torch.eye(3)[1:], sums.flip(0))) == pytest.approx(0.64)
    assert write_cosine((rows, sums), (rows, torch.zeros(2))) == 0
    # The planes share one axis, then also half of the other one.
    assert subspace_overlap(rows, torch.eye(3)[1:]) == pytest.approx(0.5)
    assert subspace_overlap(rows, torch.tensor([[0.0, 5.0, 0.0], [1.0, 7.0, 1.0]])) == pytest.approx(0.75)
    assert subspace_overlap(rows, torch.tensor([[1.0, 1.0, 0.0], [1.0, -2.0, 0.0]])) == pytest.approx(1)
    assert subspace_overlap(torch.eye(3)[:1], torch.eye(3)[2:]) == 0


def test_random_sets_hold_latents_that_fire_as_often() -> None:
    tokens = np.concatenate([np.arange(1, 101), np.arange(1000, 1100)]).astype(float)
    drawn = random_sets(tokens, np.array([1050.0, 1049.0, 50.0]), 400, np.random.default_rng(0))
    assert drawn.shape == (400, 3) and all(len(set(row)) == 3 for row in drawn.tolist())
    found = tokens[drawn]
    assert found[:, :2].min() >= 1038 and found[:, :2].max() <= 1062 and set(found[:, 2]) == set(range(41, 61))
    assert np.array_equal(drawn, random_sets(tokens, np.array([1050.0, 1049.0, 50.0]), 400, np.random.default_rng(0)))
    # As many wanted as there are: each draw holds them all.
    every = random_sets(np.array([3.0, 1.0, 2.0]), np.ones(3), 5, np.random.default_rng(0))
    assert np.sort(every).tolist() == [[0, 1, 2]] * 5


def load_stage(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"stage_{name}", ROOT / f"stages/{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def use(monkeypatch: pytest.MonkeyPatch, *, hookpoints: list[str], seeds: Sequence[int] = (1,)) -> None:
    """Let the stages read the shipped params.yaml with a small SAE on the CPU, and these for `stability`."""
    train = {"latents": 64, "k": 4, "tokens": 64 * 60, "batch": 64, "log_every": 10}
    params = SHIPPED.model_copy(
        update={
            "languages": ["en", "tr"],
            "hookpoints": [HOOKPOINT],
            "train": SHIPPED.train.model_copy(update=train),
            "stability": SHIPPED.stability.model_copy(update={"hookpoints": hookpoints, "seeds": list(seeds)}),
            "hardware": SHIPPED.hardware.model_copy(update={"accelerator": "cpu", "checkpoint_seconds": 0}),
        }
    )
    monkeypatch.setattr(config, "load", lambda: params)
    monkeypatch.setattr(config, "load_at_hookpoint", lambda: (params, HOOKPOINT))
    monkeypatch.setattr(config, "load_at_seed", lambda: (params, HOOKPOINT, seeds[-1]))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made-up activations: every row the sum of three of 24 directions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    rows, d, generator = 1200, 16, torch.Generator().manual_seed(0)
    on = torch.rand(rows, 24, generator=generator).argsort(dim=1) < 3
    x = (on * torch.rand(rows, 24, generator=generator)) @ torch.randn(24, d, generator=generator) + 1.0
    place = tmp_path / "data/activations" / HOOKPOINT
    store.write_shard(place, 0, x.half())
    store.write_index(place, [rows], d, "float16", "made-up", HOOKPOINT)
    tokens = {"row": range(rows), "split": ["train"] * 1000 + ["eval"] * 200}
    tokens |= {
        "text_id": [f"{row // 10}" for row in range(rows)],
        "language": [("en", "tr")[row // 10 % 2] for row in range(rows)],
    }
    pl.DataFrame(tokens).write_parquet(tmp_path / "data/activations/tokens.parquet")
    return tmp_path


def test_a_killed_retraining_resumes_to_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, hookpoints=[HOOKPOINT])
    stage, out = load_stage("retrain"), folder / "data/sae_again/1" / HOOKPOINT
    stage.main()
    assert {path.name for path in out.iterdir()} == {"cfg.json", "history.csv", "sae_weights.safetensors"}
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    assert not list((folder / ".scratch").iterdir())

    save = loop.AtomicCheckpointIO.save_checkpoint

    def die(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.AtomicCheckpointIO, "save_checkpoint", die)
        for path in out.iterdir():
            path.unlink()
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            stage.main()
    assert not list(out.iterdir()) and len(list((folder / ".scratch").iterdir())) == 1
    stage.main()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    use(monkeypatch, hookpoints=[HOOKPOINT], seeds=[1, 2])
    stage.main()
    other = out.parent.parent / "2" / HOOKPOINT / "sae_weights.safetensors"
    assert other.read_bytes() != (out / other.name).read_bytes() == whole[other.name]


def test_the_stage_compares_the_features_of_the_hookpoints_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    generator = torch.Generator().manual_seed(1)
    weights, bias = torch.randn(64, 16, generator=generator), torch.zeros(64)
    first = SAE(weights, weights, bias, torch.zeros(16), 4)
    # The second is the first reversed, but for latent 0, whose direction it does not have.
    turned = weights.flip(0).clone()
    turned[63] = turned[0]
    meta = {"model_name": "made-up", "hook_name": HOOKPOINT}
    checkpoint.save(first, folder / "data/sae" / HOOKPOINT, meta)
    checkpoint.save(SAE(turned, turned, bias, torch.zeros(16), 4), folder / "data/sae_again/1" / HOOKPOINT, meta)
    counts = [(unit, language, 100 - unit) for unit in range(64) for language in ("en", "tr")]
    for name in ("counts", "scores"):
        (folder / "data" / name).mkdir()
    pl.DataFrame(
        counts, schema={"unit": pl.Int32, "language": pl.String, "tokens": pl.Int64}, orient="row"
    ).write_parquet(folder / f"data/counts/{HOOKPOINT}.parquet")
    features = [("sae", HOOKPOINT, 0, "tr"), ("sae", HOOKPOINT, 9, "tr"), ("sae", HOOKPOINT, 5, "en"),
                ("sae", "layers.9.mlp", 5, "en"), ("neuron", HOOKPOINT, 6, "en")]  # fmt: skip
    pl.DataFrame(
        features, schema={"kind": pl.String, "hookpoint": pl.String, "unit": pl.Int32, "language": pl.String},
        orient="row",
    ).write_parquet(folder / "data/scores/features.parquet")  # fmt: skip

    use(monkeypatch, hookpoints=[HOOKPOINT])
    stage = load_stage("stability")
    with caplog.at_level("INFO"):
        stage.main()
    table = pl.read_parquet(folder / "data/stability/features.parquet")
    assert table.schema == run_stability.SCHEMA
    assert table.select("hookpoint", "unit", "language").rows() == [
        (HOOKPOINT, 0, "tr"), (HOOKPOINT, 9, "tr"), (HOOKPOINT, 5, "en"),
    ]  # fmt: skip
    assert table["partner"].to_list()[1:] == [54, 58] and table["cosine"][0] < 0.9
    assert table["cosine"].to_list()[1:] == [pytest.approx(1), pytest.approx(1)]
    # More firings than latent 0 none has, than 9 (twice 91) those of lower number, features left out.
    assert table["others"].to_list() == [None, 7, 4] and table["others_share"].to_list() == [None, 1.0, 1.0]
    numbers = json.loads((folder / "metrics/stability.json").read_text())
    assert numbers["stability_features"] == 3 and numbers["stability_features/tr"] == 2
    assert numbers["stability_share"] == pytest.approx(2 / 3)
    assert numbers["stability_share/tr"] == 0.5 and numbers["stability_share/en"] == 1.0
    assert numbers[f"stability_share/{HOOKPOINT}"] == numbers["stability_share"]
    assert numbers["stability_share_others"] == 1.0
    assert 0 < numbers["stability_overlap"] <= 1
    assert table["matched"].to_list() == [False, True, True] and table["encoder_cosine"][1] == pytest.approx(1)
    assert numbers["features_matched_share"] == numbers[f"features_matched_share/{HOOKPOINT}"] == pytest.approx(2 / 3)
    assert numbers["features_matched_share/tr"] == 0.5 and numbers["features_matched_share/en"] == 1.0
    assert numbers["latents_matched_share"] == 63 / 64 and 0.9 < numbers["pw_mcc"] < 1
    assert numbers["latents_matched_share_chance"] < 0.5 and 0.3 < numbers["pw_mcc_chance"] < 0.95
    assert [HOOKPOINT, "3", "0.667", "(1.000)"] in [message.split()[:4] for message in caplog.messages]

    written = (folder / "data/stability/features.parquet").read_bytes()
    stage.main()
    assert (folder / "data/stability/features.parquet").read_bytes() == written


def test_each_sae_has_feature_sets_of_its_own_and_figures_are_means_over_seeds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each token fires two latents of four that are its language's own (0 to 3: en, 4 to 7: tr), and two of the others.
    rows, generator = 1200, torch.Generator().manual_seed(0)
    language = (torch.arange(rows) // 10) % 2
    score = torch.rand(rows, 32, generator=generator)
    own = torch.arange(4) + 4 * language[:, None]
    on = torch.cat([own.gather(1, score[:, :4].topk(2).indices), 8 + score[:, 8:].topk(2).indices], dim=1)
    x = torch.zeros(rows, 32).scatter_(1, on, 1.0 + torch.rand(rows, 4, generator=generator))
    place = folder / "data/activations" / HOOKPOINT
    store.write_shard(place, 0, x.half())
    store.write_index(place, [rows], 32, "float16", "made-up", HOOKPOINT)
    order = torch.randperm(32, generator=generator)
    # Seed 1 has the same latents in another order, seed 2 writes all of them in unrelated directions.
    unrelated = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    decoders = {"sae": torch.eye(32), "sae_again/1": torch.eye(32)[order], "sae_again/2": unrelated[order]}
    for name, decoder in decoders.items():
        encoder = torch.eye(32) if name == "sae" else torch.eye(32)[order]
        dictionary = SAE(encoder, decoder, torch.zeros(32), torch.zeros(32), 4)
        meta = {"model_name": "made-up", "hook_name": HOOKPOINT}
        checkpoint.save(dictionary, folder / f"data/{name}" / HOOKPOINT, meta)
    use(monkeypatch, hookpoints=[HOOKPOINT])
    for name in ("encode", "extend", "score"):
        load_stage(name).main()

    def found(*seeds: int) -> tuple[pl.DataFrame, dict[str, float]]:
        use(monkeypatch, hookpoints=[HOOKPOINT], seeds=seeds)
        load_stage("stability").main()
        table = pl.read_parquet(folder / "data/stability/features.parquet")
        assert sorted(table.select("language", "unit").rows()) == [(("en", "tr")[i // 4], i) for i in range(8)]
        again = pl.read_parquet(folder / "data/stability/again.parquet")
        assert again.schema == run_stability.AGAIN and again["seed"].unique(maintain_order=True).to_list() == [*seeds]
        # Latent j of the other SAEs is latent order[j] of the first.
        names = [("en", "tr")[int(order[unit]) // 4] for unit in again["unit"]]
        assert len(again) == 8 * len(seeds) and again["language"].to_list() == names
        return table, json.loads((folder / "metrics/stability.json").read_text())

    (same, alike), (other, unlike) = found(1), found(2)
    for numbers in (alike, unlike):
        for name in ("en", "tr"):
            figures = [
                numbers[f"{key}/{name}"] for key in ("features_matched_share", "write_cosine", "subspace_overlap")
            ]
            random, high = (numbers[f"subspace_overlap_random{end}/{name}"] for end in ("", "_high"))
            if numbers is alike:
                assert figures == [1, pytest.approx(1), pytest.approx(1)] and random == high == 0
            else:  # expected of unrelated spans: 4 of 32 dimensions
                assert figures[0] == 0 and abs(figures[1]) < 0.6 and figures[2] < 0.3 and 0.05 < random < high < 0.4
    assert alike["latents_matched_share"] == 1 and unlike["latents_matched_share"] == 0

    both, numbers = found(1, 2)
    assert numbers["stability_features"] == 8 and numbers["features_matched_share"] == 0.5
    assert not both["matched"].any() and both["partner"].equals(same["partner"])
    assert both["cosine"].to_list() == pytest.approx(((same["cosine"] + other["cosine"]) / 2).to_list())
    assert set(numbers) == set(alike)
    for key in numbers:
        if "_random" not in key and "chance" not in key:
            assert numbers[key] == pytest.approx((alike[key] + unlike[key]) / 2), key
    before = (folder / "metrics/stability.json").read_bytes()
    load_stage("stability").main()
    assert (folder / "metrics/stability.json").read_bytes() == before


def test_without_hookpoints_there_is_an_empty_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "data/scores").mkdir()
    pl.DataFrame({"kind": ["sae"], "hookpoint": [HOOKPOINT], "unit": [1], "language": ["en"]}).write_parquet(
        folder / "data/scores/features.parquet"
    )
    use(monkeypatch, hookpoints=[])
    stage = load_stage("stability")
    stage.main()
    table = pl.read_parquet(folder / "data/stability/features.parquet")
    assert table.is_empty() and table.schema == run_stability.SCHEMA
    assert json.loads((folder / "metrics/stability.json").read_text()) == {"stability_features": 0}


def test_what_params_no_longer_lists_is_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    items = {f"train@{name}": f"sae/{name}" for name in (HOOKPOINT, "layers.9.mlp")}
    items |= {
        f"retrain@{name}-{seed}": f"sae_again/{seed}/{name}" for name in (HOOKPOINT, "layers.9.mlp") for seed in (1, 2)
    }
    lock = "".join(f"  {item}:\n    outs:\n    - path: data/{path}\n" for item, path in items.items())
    (tmp_path / "dvc.lock").write_text(f"stages:\n  score: {{}}\n{lock}")
    kept = [tmp_path / f"data/sae/{HOOKPOINT}", tmp_path / f"data/sae_again/2/{HOOKPOINT}"]
    gone = [tmp_path / "data" / path for path in items.values() if tmp_path / "data" / path not in kept]
    for path in (*kept, *gone):
        path.mkdir(parents=True, exist_ok=True)
    use(monkeypatch, hookpoints=[HOOKPOINT], seeds=[2])
    prune.run(config.load(), Paths())
    assert all(path.is_dir() for path in kept) and not any(path.exists() for path in gone)
    use(monkeypatch, hookpoints=[])
    prune.run(config.load(), Paths())
    assert kept[0].is_dir() and kept[1].parent.is_dir() and not kept[1].exists()
