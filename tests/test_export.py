"""`babelscope export`: what is written where, and what is refused."""

from pathlib import Path

import pytest
import torch

from babelscope.core.errors import UserError
from babelscope.sae import export
from babelscope.sae.autoencoder import SAE
from babelscope.sae.checkpoint import load, save


def example(k: int | None = 3) -> SAE:
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(*shape, generator=draw) for shape in ((12, 5), (12, 5), (12,), (5,))]
    return SAE(*weights, k, threshold=None if k else torch.rand(12, generator=draw))


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("layers.1.mlp", "layers.2.mlp"):
        save(example(), Path("data/sae") / name, {"model_name": "m", "hook_name": name})
    return tmp_path


def test_every_sae_or_those_named_are_exported_and_load_to_the_same(repo: Path) -> None:
    export.main(Path("out"), [])
    export.main(Path("some"), ["layers.2.mlp"])
    assert {path.name for path in (repo / "out").iterdir()} == {"layers.1.mlp", "layers.2.mlp"}
    assert {path.name for path in (repo / "some").iterdir()} == {"layers.2.mlp"}
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(load(repo / "out", "layers.1.mlp")(x), example()(x), rtol=0, atol=1e-6)


def test_where_there_is_nothing_to_export_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="data/sae: no SAEs; `dvc repro` trains them"):
        export.main(Path("out"), [])


def test_an_unknown_hookpoint_and_a_threshold_are_refused(repo: Path) -> None:
    with pytest.raises(UserError, match="data/sae/layers.3.mlp: no such folder; allowed: layers.1.mlp, layers.2.mlp"):
        export.main(Path("out"), ["layers.3.mlp"])
    save(example(None), Path("data/sae/layers.1.mlp"), {"model_name": "m", "hook_name": "h"})
    with pytest.raises(UserError, match="layers.1.mlp: sparsify has no JumpReLU, BatchTopK or ReLU SAEs"):
        export.main(Path("out"), ["layers.1.mlp"])
