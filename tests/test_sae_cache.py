"""The cache: it returns the SAE in the file, and holds no more than `max_bytes`."""

import gc
import weakref

import pytest
import torch

from babelscope.ablation.interventions import Additive, FeatureAblation
from babelscope.core.errors import UserError
from babelscope.sae import SAE, SAECache, checkpoint

NAMES = [f"layers.{number}.mlp" for number in range(4)]
LATENTS, D = 32, 8
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sae")
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(shape, generator=generator) for shape in ((LATENTS, D), (LATENTS, D), (LATENTS,), (D,))]
        checkpoint.save(SAE(*weights, k=3), root / name, {"model_name": "m", "hook_name": name})
    return root


def size(folder):
    sae = checkpoint.load(folder, NAMES[0])
    return sum(tensor.nbytes for tensor in sae.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("held", [0, 1, 2, 4])
def test_an_sae_from_the_cache_computes_what_the_sae_in_the_file_does(folder, held, device):
    cache = SAECache(folder, NAMES, torch.device(device), max_bytes=held * size(folder))
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(9)).to(device)
    for name in [*NAMES, *reversed(NAMES)]:
        one, other = cache[name], checkpoint.load(folder, name).to(device)
        assert (one.latents, one.d, one.d_in, one.b_in) == (LATENTS, D, D, None)
        assert torch.equal(one.W_dec, other.W_dec) and torch.equal(one.b_dec, other.b_dec)
        assert torch.equal(one(x), other(x))
        for mine, wanted in zip(one.encode(x), other.encode(x), strict=True):
            assert torch.equal(mine, wanted)


@pytest.mark.parametrize("held", [0, 1, 2])
def test_no_more_is_held_than_there_max_bytes_allow(folder, held):
    cache = SAECache(folder, NAMES, max_bytes=held * size(folder))
    alive = []
    for name in NAMES * 3:
        alive.append(weakref.ref(cache.get_sae(name)))
        gc.collect()
        assert len({id(sae) for sae in (one() for one in alive) if sae is not None}) <= max(held, 1)


def test_what_fits_is_read_once(folder, monkeypatch):
    limit, read, load = 3 * size(folder), [], checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda path, name: read.append(name) or load(path, name))
    all_of_them = SAECache(folder, NAMES)
    for name in NAMES * 2:
        all_of_them[name].encode(torch.zeros(1, D))
    assert read == NAMES
    read.clear()
    three = SAECache(folder, NAMES, max_bytes=limit)
    assert read == NAMES
    for name in NAMES * 2:
        three[name].encode(torch.zeros(1, D))
    assert read[4:] == [*NAMES, NAMES[2], NAMES[3]]  # the first two stay, the others take turns


def test_a_broken_one_is_found_at_once(folder, tmp_path):
    for name in NAMES[:2]:
        checkpoint.save(checkpoint.load(folder, name), tmp_path / name, {})
    (tmp_path / NAMES[1] / "sae_weights.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"layers\.1\.mlp"):
        SAECache(tmp_path, NAMES[:2])


def test_interventions_from_the_cache_are_those_of_the_saes(folder):
    cache, units = SAECache(folder, NAMES, max_bytes=0), [[1, 5, 7], [], [30, 5]]
    x = torch.randn(6, D, generator=torch.Generator().manual_seed(3))
    condition = torch.tensor([0, 1, 2, 2, 1, 0])
    largest = torch.rand(LATENTS, generator=torch.Generator().manual_seed(4))
    for name in NAMES:
        whole = checkpoint.load(folder, name)
        mine, wanted = FeatureAblation(cache[name], units), FeatureAblation(whole, units)
        assert torch.equal(mine.affected_tokens(x), wanted.affected_tokens(x))
        assert torch.equal(mine.change(x, condition), wanted.change(x, condition))
        table = torch.zeros(3, LATENTS)
        for row, some in enumerate(units):
            table[row, some] = -0.2 * largest[some]
        shifted = Additive(cache[name], units, largest, -0.2).change(x, condition)
        torch.testing.assert_close(shifted, x + (table @ whole.W_dec.detach())[condition])
