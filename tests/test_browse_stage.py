"""The stage `browse` on a tiny model, from stored activations and from a running forward pass."""

import copy
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import test_neurons_stages as neurons
import torch
from polars.testing import assert_frame_equal
from test_neurons_stages import LANGUAGES, SAE_AT, corpus, model, set_params, stage  # noqa: F401
from torch.nn import functional as F  # noqa: N812

from babelscope.core.errors import UserError
from babelscope.models import hookpoints, loading, logit_lens
from babelscope.report import browser
from babelscope.sae import checkpoint
from babelscope.sae.autoencoder import SAE

NAMES = ("features", "probabilities", "histograms", "texts", "examples", "neighbours", "tokens")
WIDE = "layers.2.mlp.act_fn"  # 24 neurons: not as wide as the residual stream


TOKENS = 60  # of the 99 rows of the embedding: the others have no text


class Tokenizer:
    """A token per number, behind one special token."""

    def get_vocab(self) -> dict[str, int]:
        return {f" {number}": number for number in range(TOKENS)}

    def __call__(self, texts: Any, return_offsets_mapping: bool = False, **options: Any) -> dict[str, Any]:
        found = neurons.tokenizer(texts, **options)
        if return_offsets_mapping:
            found["offset_mapping"] = [[match.span() for match in re.finditer(r"\d+", text)] for text in texts]
        return found

    def decode(self, ids: list[int]) -> str:
        assert ids[0] < TOKENS
        return f" {ids[0]}"


class SlowTokenizer(Tokenizer):
    """One that does not say where in a text its tokens are."""

    is_fast = False

    def __call__(self, texts: Any, **options: Any) -> dict[str, Any]:
        assert not options.pop("return_offsets_mapping", False)
        return super().__call__(texts, **options)

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f" {number}" for number in ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Iterator[Path]:  # noqa: F811
    """A folder in which the stages before `browse` have run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("browse"))
        patch.setattr(loading, "load_tokenizer", lambda section: Tokenizer())
        patch.setattr(loading, "load_skeleton", lambda section: model)
        patch.setattr(loading, "load_model", lambda section, dtype: copy.deepcopy(model))
        Path("data/corpus").mkdir(parents=True)
        for name in ("texts", "train"):
            corpus().write_parquet(f"data/corpus/{name}.parquet")
        g = torch.Generator().manual_seed(2)
        for name, d in ((SAE_AT, 16), (WIDE, 24)):
            decoder = F.normalize(torch.randn(64, d, generator=g), dim=1)
            dictionary = SAE(decoder * 0.7, decoder, torch.zeros(64), torch.zeros(d), 3)
            checkpoint.save(dictionary, Path("data/sae") / name, {"model_name": "tiny", "hook_name": name})
        browse()
        for name in ("extract", f"encode {SAE_AT}", f"encode {WIDE}", "extend", "score", "browse"):
            stage(*name.split())
        yield Path.cwd()


def browse(source: str = "stored", **changes: Any) -> None:
    set_params(
        train={"source": source},
        browse={"texts": 2, "tokens": 3, "ablated": 99, "ablation_texts": 2, "shared": 9, "train_tokens": None}
        | changes,
    )
    text = (
        Path("params.yaml").read_text().replace(f'"hookpoints": ["{SAE_AT}"]', f'"hookpoints": ["{SAE_AT}", "{WIDE}"]')
    )
    Path("params.yaml").write_text(text)


def tables() -> dict[str, pl.DataFrame]:
    return {name: pl.read_parquet(f"data/browse/{name}.parquet") for name in NAMES}


def test_every_table_is_what_the_texts_and_the_model_give(folder: Path, model: Any) -> None:  # noqa: F811
    found = tables()
    features, key = found["features"], ["hookpoint", "layer", "unit"]
    selected = pl.read_parquet("data/scores/features.parquet")
    assert features.filter(kind="specific").select(key).sort(key).equals(selected.select(key).sort(key))
    assert 0 < features.filter(kind="shared").height <= 9 and set(features["hookpoint"]) == {SAE_AT, WIDE}
    same = features.filter(kind="specific").explode("languages").join(selected, on=key, suffix="_score")
    assert same["languages"].equals(same["language"]) and same["entropy"].equals(same["entropy_score"])
    rates = found["probabilities"]
    assert len(rates) == 3 * len(features)
    owned = rates.join(selected, on=[*key, "language"])
    assert len(owned) == len(selected) and owned["probability"].equals(owned["probability_right"])

    texts = corpus()
    of = {row["text_id"]: row for row in texts.iter_rows(named=True)}
    saes = {name: checkpoint.load("data/sae", name) for name in (SAE_AT, WIDE)}

    def activations(name: str, unit: int, text_id: str) -> torch.Tensor:
        ids = torch.tensor([[1, *(int(word) for word in of[text_id]["text"].split())]])
        x = hookpoints.read(model, [name], input_ids=ids)[name][0, 1:]
        values, indices = saes[name].encode(x.half())
        return torch.zeros(len(x), 64).scatter(1, indices, values)[:, unit]

    pieces = dict(found["texts"].select("text_id", "pieces").iter_rows())
    assert all("".join(parts) == of[text_id]["text"] for text_id, parts in pieces.items())
    assert set(found["texts"]["split"]) == {"train"}
    for row in features.iter_rows(named=True):
        name, unit = row["hookpoint"], row["unit"]
        every = {one: activations(name, unit, one) for one in of}
        shown = found["examples"].filter(hookpoint=name, unit=unit)
        for side in ("own", "other"):
            among = [
                one for one in of
                if of[one]["split"] == "train" and (of[one]["language"] in row["languages"]) == (side == "own")
            ]  # fmt: skip
            peaks = sorted((every[one].max().item() for one in among), reverse=True)[:2]
            mine = shown.filter(side=side)
            assert mine["place"].to_list() == list(range(len(mine)))
            assert mine["activations"].list.max().to_list() == pytest.approx([p for p in peaks if p], rel=2e-3)
            for text_id, values in mine.select("text_id", "activations").iter_rows():
                assert values == pytest.approx(every[text_id].tolist(), rel=5e-3, abs=5e-3)
                assert len(values) == len(pieces[text_id])
        on_train = torch.cat([every[one] for one in of if of[one]["split"] == "train"])
        assert row["largest"] == pytest.approx(on_train.max().item(), rel=2e-3)
        bars = found["histograms"].filter(hookpoint=name, unit=unit)
        assert bars["own"].sum() + bars["other"].sum() == int((on_train > 0).sum())
        assert bars["high"][-1] == pytest.approx(row["largest"])
        held_out = [one for one in of if of[one]["split"] == "eval" and of[one]["language"] in row["languages"]]
        # Of the shared features none is removed alone.
        assert row["delta_texts"] == (min(2, len(held_out)) if row["kind"] == "specific" else 0)
        assert (row["delta"] is None) == (row["delta_texts"] == 0)
    assert features["delta"].drop_nulls().abs().max() > 1e-4

    near = found["neighbours"]
    assert len(near) == 5 * len(features) and near["cosine"].is_between(-1, 1).all()
    assert near.filter(pl.col("neighbour") == pl.col("unit")).is_empty()

    tokens = found["tokens"]
    assert set(tokens["hookpoint"]) == {SAE_AT} and len(tokens) == 6 * len(features.filter(hookpoint=SAE_AT))
    assert tokens["token"].equals(" " + tokens["token_id"].cast(pl.String))
    head = model.get_output_embeddings().weight * model.base_model.norm.weight
    first = features.filter(hookpoint=SAE_AT)["unit"][0]
    logits = (head @ saes[SAE_AT].W_dec[first])[:TOKENS]
    best = tokens.filter(unit=first, side="promoted")
    assert best["token_id"].to_list() == logits.topk(3).indices.tolist()
    assert best["logit"].to_list() == pytest.approx(logits.topk(3).values.tolist(), rel=1e-3)
    assert browser.build(browser.BrowserInputs(LANGUAGES, [SAE_AT, WIDE], "tiny", found))
    assert not Path(".scratch").exists() or not list(Path(".scratch").iterdir())


def test_a_tokenizer_without_offsets_gives_the_same_on_the_decoded_texts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = tables()
    monkeypatch.setattr(loading, "load_tokenizer", lambda section: SlowTokenizer())
    browse()
    stage("browse")
    found = tables()
    texts, decoded = before.pop("texts"), found.pop("texts")
    whole = pl.col("pieces").list.join("")
    assert decoded.select(whole)["pieces"].to_list() == [f" {text}" for text in texts.select(whole)["pieces"]]
    assert decoded.drop("pieces").equals(texts.drop("pieces"))
    assert all(found[name].equals(before[name]) for name in before)
    monkeypatch.setattr(loading, "load_tokenizer", lambda section: Tokenizer())
    stage("browse")


def test_a_second_run_gives_the_same_bytes_and_a_running_pass_the_same_tables(folder: Path) -> None:
    def digests() -> list[str]:
        return [hashlib.md5(Path(f"data/browse/{name}.parquet").read_bytes()).hexdigest() for name in NAMES]

    before, stored = digests(), tables()
    browse()
    stage("browse")
    assert digests() == before
    browse("stream")
    stage("browse")
    for name, frame in tables().items():
        assert_frame_equal(frame, stored[name], rel_tol=5e-3, abs_tol=5e-3)
    browse(ablation_texts=0, shared=0)
    stage("browse")
    found = tables()["features"]
    assert found["delta"].null_count() == len(found) and set(found["kind"]) == {"specific"}
    browse()
    stage("browse")
    assert digests() == before


def test_a_part_of_the_texts_is_read_the_same_one_each_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    whole = tables()
    sizes = corpus().filter(split="train").with_columns(size=pl.col("text").str.split(" ").list.len()).sort("text_id")
    before = (pl.col("size").cum_sum() - pl.col("size")).over("language")
    part = set(sizes.filter(before < 20)["text_id"])
    assert 0 < len(part) < len(sizes)
    browse(train_tokens=20)
    stage("browse")
    found = tables()
    assert set(found["examples"]["text_id"]) <= part
    for name in ("features", "probabilities", "neighbours", "tokens"):  # these come from all texts, or from none
        assert found[name].equals(whole[name]), name
    assert found["histograms"]["own"].sum() < whole["histograms"]["own"].sum()
    browse()
    stage("browse")


def test_transcoders_are_read_at_their_input_and_none_is_removed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data/corpus").mkdir(parents=True)
    for name in ("texts", "train"):
        corpus().write_parquet(f"data/corpus/{name}.parquet")
    g = torch.Generator().manual_seed(2)
    encoder, decoder = (F.normalize(torch.randn(64, 16, generator=g), dim=1) for _ in range(2))
    dictionary = SAE(encoder, decoder, torch.zeros(64), torch.zeros(16), 3, b_in=torch.zeros(16))
    checkpoint.save(dictionary, Path("data/sae") / SAE_AT, {"model_name": "tiny", "hook_name": SAE_AT})
    found = []
    for source in ("stored", "stream"):
        set_params(
            train={"source": source, "transcode": True}, ablate={"methods": ["directional"]}, browse={"texts": 2}
        )
        for name in ("extract", f"encode {SAE_AT}", "extend", "score", "browse") if source == "stored" else ("browse",):
            stage(*name.split())
        found.append(tables())
    for name, frame in found[1].items():
        assert_frame_equal(frame, found[0][name], rel_tol=5e-3, abs_tol=5e-3)
    features = found[0]["features"]
    assert len(features) and features["delta"].null_count() == len(features)
    peaks = found[0]["examples"].group_by("unit").agg(pl.col("activations").list.max().max())
    largest = features.join(peaks, on="unit")
    assert largest["activations"].to_list() == pytest.approx(largest["largest"].to_list(), rel=1e-3)


def test_a_model_without_a_logit_lens_has_no_tokens_to_list(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(logit_lens, "_moves_as", lambda *_: False)
        browse()
        stage("browse")
    assert tables()["tokens"].is_empty() and tables()["features"].height
    assert "no tokens are listed: params.yaml: model.name: LlamaForCausalLM has no logit lens" in caplog.text
    stage("browse")
    assert tables()["tokens"].height


def test_no_feature_at_all_is_a_result(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    for path in (folder / "data").iterdir():
        if path.name not in ("scores", "browse"):
            (tmp_path / "data" / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    browse()
    text = Path("params.yaml").read_text().replace('"token_rate": 0.05', '"token_rate": 1.0')
    Path("params.yaml").write_text(text)
    stage("score")
    stage("browse")
    found = tables()
    assert all(frame.is_empty() for frame in found.values())
    assert "0 language-specific features" in browser.build(browser.BrowserInputs(LANGUAGES, [SAE_AT, WIDE], "t", found))
    (tmp_path / "data/scores/features.parquet").unlink()
    with pytest.raises(UserError, match="features.parquet: no such file; an earlier stage writes it"):
        stage("browse")


def test_stale_scores_are_named(folder: Path) -> None:
    path = Path("data/scores/features.parquet")
    before = path.read_bytes()
    frame = pl.read_parquet(path)
    frame.with_columns(unit=pl.lit(999, frame["unit"].dtype)).write_parquet(path)
    try:
        with pytest.raises(
            UserError, match="other features than data/counts and params.yaml give; run `dvc repro score`"
        ):
            stage("browse")
    finally:
        path.write_bytes(before)
