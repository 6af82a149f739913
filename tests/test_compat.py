"""Without a private function of PyTorch the result is the same."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from babelscope.models import compat
from babelscope.sae.kernels.dots import dots


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    compat.multiplies_bfloat16.cache_clear()
    compat.gathered_dots.cache_clear()


def test_without_pytorchs_answer_the_processor_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = compat.multiplies_bfloat16()
    compat.multiplies_bfloat16.cache_clear()
    monkeypatch.setattr(torch, "cpu", SimpleNamespace())
    if Path("/proc/cpuinfo").is_file():
        assert compat.multiplies_bfloat16() == usual
    (tmp_path / "cpuinfo").write_text("flags : avx2 avx512_bf16")
    assert compat.multiplies_bfloat16(tmp_path / "cpuinfo") and not compat.multiplies_bfloat16(tmp_path / "none")


@pytest.mark.parametrize("fault", ["absent", "other arguments", "other result"])
def test_without_the_private_kernel_the_dot_products_are_the_same(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(30, 16), torch.randn(20, 16)
    i, j = torch.randint(30, (500,)).sort().values, torch.randint(20, (500,))
    usual = dots(a, b, i, j)
    compat.gathered_dots.cache_clear()

    def other(*_: object) -> torch.Tensor:
        if fault == "other arguments":
            raise RuntimeError("expected at most 3 arguments")
        return torch.zeros(2)

    ops = SimpleNamespace() if fault == "absent" else SimpleNamespace(_embedding_bag_per_sample_weights_backward=other)
    monkeypatch.setattr(torch.ops, "aten", ops)
    found = compat.gathered_dots()
    monkeypatch.undo()
    assert found is None
    assert torch.allclose(dots(a, b, i, j), usual, rtol=0, atol=64 * torch.finfo().eps)
    compat.gathered_dots.cache_clear()
    assert compat.gathered_dots() is not None
