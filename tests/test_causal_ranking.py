"""Features by their effect: the gradient against autograd and differences, the ranking and its curve by hand."""

import numpy as np
import polars as pl
import pytest
import torch
from test_ablation import COUNTED, OWNED, TOTALS, make, make_saes, make_texts
from torch import nn
from torch.nn import functional as F  # noqa: N812

from babelscope.ablation import ranking
from babelscope.ablation.ablate import TextNLL, ablate
from babelscope.ablation.attribution import attribute
from babelscope.ablation.conditions import TOP, Conditions, conditions
from babelscope.ablation.interventions import FeatureAblation, Replacement, interventions
from babelscope.ablation.run import _mean_activation
from babelscope.ablation.statistics import Measured
from babelscope.models import hookpoints, nll
from babelscope.sae.autoencoder import SAE

NAMES = ("layers.1", "layers.2.mlp")


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 5.0), (0.5, 3.0)])
def test_the_gradient_of_the_nll_is_that_of_autograd(scale, cap, monkeypatch):
    monkeypatch.setattr(nll, "COLUMNS", 7)
    monkeypatch.setattr(nll, "ROWS", 4)
    g = torch.Generator().manual_seed(0)
    unembedding = nn.Linear(6, 40).requires_grad_(False)
    x = torch.randn((9, 6), generator=g, dtype=torch.float64) * torch.linspace(0.1, 60, 9).double().unsqueeze(1)
    wanted = torch.randint(0, 40, (9,), generator=g)
    x.requires_grad_()
    logits = scale * (x @ unembedding.weight.double().T + unembedding.bias.double())
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    F.cross_entropy(logits, wanted, reduction="sum").backward()
    found = nll.Head(unembedding, scale, cap).gradient(x.detach().float(), wanted)
    assert torch.allclose(found.double(), x.grad, atol=1e-4)


@pytest.mark.parametrize("reproducible", [True, False])
def test_the_estimate_is_the_derivative_of_the_nll_by_the_share_that_is_removed(reproducible, monkeypatch):
    """NLL(x - s z_u W_dec[u]) over s at 0, by differences of whole passes over one text after the other."""
    model, texts = make("llama"), make_texts()
    if not reproducible:
        monkeypatch.setitem(nll._heads, model, None)
    saes = {name: make_saes(model)[name] for name in NAMES}
    group = [int(text.text_id[1:]) % 2 for text in texts]
    found = attribute(model, saes, texts, group, 3, 40)
    assert all(effect.shape == (3, saes[name].latents) for name, effect in found.items())
    assert all(effect[2].isnan().all() and effect[:2].isfinite().all() for effect in found.values())
    assert not any(parameter.requires_grad for parameter in model.parameters())

    model = model.double()

    def total(name, unit, share, code):
        def edit(x, special):
            values, indices = saes[name].encode(x)
            z = torch.where(indices == unit, values, 0.0).sum(-1, keepdim=True).double()
            changed = x - share * z * saes[name].W_dec[unit].double()
            return torch.cat([x[:, :special], changed[:, special:]], 1)

        nats, count = 0.0, 0
        for text, of in zip(texts, group, strict=True):
            if of == code and len(text.ids) > 1:
                ids = torch.tensor([text.ids])
                with hookpoints.editing(model, {name: lambda x, text=text: edit(x, text.special)}):
                    logits = model(input_ids=ids, use_cache=False).logits
                losses = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")[max(text.special - 1, 0) :]
                nats, count = nats + losses.sum().item(), count + len(losses)
        return nats / count

    with torch.no_grad():
        for name in NAMES:
            largest = found[name][:2].abs().sum(0).topk(2).indices.tolist()
            for unit in largest:
                for code in (0, 1):
                    slope = (total(name, unit, 0.02, code) - total(name, unit, -0.02, code)) / 0.04
                    assert found[name][code, unit].item() == pytest.approx(slope, rel=5e-3, abs=5e-5)


def test_half_way_the_contributions_sum_to_the_effect_of_removing_all():
    model, texts = make("llama"), make_texts()
    saes = {name: make_saes(model)[name] for name in NAMES}
    units = {"layers.1": list(range(0, 64, 3)), "layers.2.mlp": list(range(0, 64, 4))}
    removed = {name: torch.zeros((2, saes[name].latents), dtype=torch.bool) for name in NAMES}
    for name, chosen in units.items():
        removed[name][1, chosen] = True
    group = [1] * len(texts)
    made = {name: FeatureAblation(saes[name], [units[name]]) for name in NAMES}
    nll_of = ablate(model, made, texts, 40)
    true = float((nll_of.ablated[0] - nll_of.clean).sum() / nll_of.tokens.sum())

    def total(at):
        found = attribute(model, saes, texts, group, 2, 40, removed=at)
        return float(sum(found[name][1, chosen].sum() for name, chosen in units.items()))

    assert abs(true) > 0.01 and abs(total(removed) - true) < 0.5 * abs(total(None) - true)
    nothing = {name: table.roll(1, 0) for name, table in removed.items()}  # the units of another group
    assert total(nothing) == total(None)


def test_features_are_ranked_by_what_they_cost_their_own_language_more_than_others():
    features = pl.DataFrame(
        [("h", 1, 0, "en", 0.5, 1), ("h", 1, 1, "en", 0.6, 2), ("h", 1, 2, "fi", 0.1, 1), ("i", 2, 0, "en", 0.7, 3)],
        schema=["hookpoint", "layer", "unit", "language", "entropy", "rank"], orient="row",
    )  # fmt: skip
    nan = np.nan
    effects = {
        "h": np.array([[0.4, 0.5, 0.0], [0.3, 0.1, 0.2], [nan, nan, nan]]),
        "i": np.array([[0.35], [0.0], [nan]]),
    }
    found = ranking.ranking(features, effects, ["en", "fi", "sv"])
    assert found.select("hookpoint", "unit", "language", "causal_rank").rows() == [
        ("h", 1, "en", 1), ("i", 0, "en", 2), ("h", 0, "en", 3), ("h", 2, "fi", 1)]  # fmt: skip
    assert found["effect"].to_list() == pytest.approx([0.4, 0.35, 0.1, 0.2])
    assert found["others"].to_list() == pytest.approx([0.1, 0.0, 0.3, 0.0]) and found["rank"].to_list() == [2, 3, 1, 1]


def test_the_first_ranks_are_conditions_with_a_control_each():
    ranks = OWNED.with_columns(causal_rank=pl.Series([3, 1, 4, 5, 2, 1, 2]))
    counts = {"layers.1": COUNTED, "layers.2": COUNTED}
    options = {"ratio": 1e-9, "by_layer": False, "draws": 2, "seed": 0}
    what = conditions(OWNED, counts, TOTALS, ["en", "fi"], **options, ranking=ranks)
    plain = conditions(OWNED, counts, TOTALS, ["en", "fi"], **options)
    assert what.keys[:6].equals(plain.keys) and plain.keys["top"].null_count() == 6
    tops = what.keys[6:]
    assert tops["top"].to_list() == [top for top in TOP for _ in range(4)]
    assert tops["control"].to_list() == [None, None, 0, 0] * 4 and tops["ablated"].to_list() == ["en", "fi"] * 8
    own = {
        (row["ablated"], row["top"]): row["condition"] for row in tops.filter(pl.col("control").is_null()).to_dicts()
    }
    assert [what.units["layers.1"][own["en", top]] for top in TOP] == [[9], [9], [3, 9, 40, 77], [3, 9, 40, 77]]
    assert [what.units["layers.2"][own["en", top]] for top in TOP] == [[], [6], [6], [6]]
    assert [what.units["layers.1"][own["fi", top]] for top in TOP] == [[8], [5, 8], [5, 8], [5, 8]]
    rate = dict(COUNTED.filter(language="en").select("unit", "tokens").iter_rows())
    for row in tops.filter(control=0, ablated="en").to_dicts():
        drawn, mine = (what.units["layers.1"][n] for n in (row["condition"], own["en", row["top"]]))
        assert not set(drawn) & {3, 9, 40, 77, 5, 8} and sum(rate[u] for u in drawn) >= sum(rate[u] for u in mine)
    without = conditions(OWNED, counts, TOTALS, ["en"], **{**options, "draws": 0}, ranking=ranks)
    assert without.keys["control"].null_count() == len(without.keys) == 5

    language, tokens = ["en", "fi", "sv"] * 16, np.full(48, 10)
    asked = what.asked(language, tokens, 60)
    by_language = asked.reshape(len(asked), 16, 3).sum(1)
    assert (by_language[6:, :2][np.arange(16), np.arange(16) % 2] == 2).all()  # an eighth of its own texts
    assert by_language[6:].sum(1).tolist() == [2 + 3, 2 + 6, 2, 2] * 4  # and others' texts, but not for a control


def test_the_curve_by_hand():
    """en loses 1, 3, 4, 4 by the first 1, 2, 5, 10 units and 6 by all; fi gains. The others lose a tenth of it."""
    keys = [(name, None, draw, None) for name in ("en", "fi") for draw in (None, 0, 1)] + [("en", "h", None, None)]
    keys += [(name, None, draw, top) for top in TOP for draw in (None, 0) for name in ("en", "fi")]
    schema = {"ablated": pl.String, "hookpoint": pl.String, "control": pl.Int32, "top": pl.Int32}
    frame = pl.DataFrame(keys, schema=schema, orient="row").with_row_index("condition").with_columns(script=False)
    size = {1: 1.0, 2: 3.0, 5: 4.0, 10: 4.0, None: 6.0}
    language, tokens = ["en", "en", "en", "fi", "fi"], torch.tensor([10, 20, 10, 10, 10])
    ablated = torch.full((len(keys), 5), torch.nan, dtype=torch.float64)
    for row, (name, hookpoint, draw, top) in enumerate(keys):
        for text, of in enumerate(language):
            value = size[top] * (1 if name == "en" else -1) * (1.0 if of == name else 0.1)
            value = 0.5 if draw == 0 else 99.0 if draw == 1 or hookpoint else value
            if top is None or text in (0, 1, 3):  # the curve is measured on three of the five texts
                ablated[row, text] = 2.0 + value * tokens[text] + (99.0 if text in (2, 4) else 0.0)
    units = [[0] * (20 if top is None else top) for _, _, _, top in keys]
    what = Conditions(frame, {"h": units, "i": [[]] * len(keys)})
    clean = torch.full((5,), 2.0, dtype=torch.float64)
    nll = TextNLL(clean, ablated, tokens, 0, 0, 0, ablated, tokens)
    found, figures = ranking.curve(Measured(nll, what, "feature", language, ["en", "fi"], 100, 0))
    en = found.filter(language="en")
    assert en["top"].to_list() == [1, 2, 5, 10, None] and en["features"].to_list() == [1, 2, 5, 10, 20]
    assert en["own"].to_list() == pytest.approx([1, 3, 4, 4, 6]) and en["tokens"].to_list() == [30] * 5
    assert en["low"].to_list() == en["high"].to_list() == pytest.approx(en["own"].to_list())
    assert en["others"].to_list() == pytest.approx([0.1, 0.3, 0.4, 0.4, 0.6])
    assert en["control"].to_list() == pytest.approx([0.5] * 5)
    assert figures["curve_own/2"] == figures["curve_others/all"] == pytest.approx(0)
    assert figures["curve_control/10"] == pytest.approx(0.5)
    assert figures["features_for_half/en"] == 2 and "features_for_half/fi" not in figures
    assert [figures[f"languages_half_by/{top}"] for top in TOP] == [0, 1, 1, 1]


def test_constants_in_place_of_activations_by_hand():
    sae = SAE(torch.eye(3), torch.tensor([[2.0, 0, 0], [0, 1.0, 0], [0, 0, 3.0]]), torch.zeros(3), torch.zeros(3), 1)
    values = torch.tensor([[0.5, 4.0, 9.0], [0.0, 7.0, 9.0], [1.0, 1.0, 1.0]])
    done = Replacement(sae, [[0, 1], [0], []], values)
    x = torch.tensor([[3.0, 1, 0], [0, 5.0, 0]])  # latent 0 fires at 3 on the first token, latent 1 at 5 on the second
    assert done.affected_tokens(x).tolist() == [[True, True], [True, False], [False, False]]
    expected = torch.tensor([[-3.0 + 1, 1 + 4, 0], [0 + 1, 0 + 4.0, 0]])  # x - z W + 0.5 (2, 0, 0) + 4 (0, 1, 0)
    assert torch.allclose(done.change(x, torch.tensor([0, 0])), expected)
    assert torch.allclose(done.change(x, torch.tensor([1, 1])), torch.tensor([[-3.0, 1, 0], [0, 5.0, 0]]))
    assert torch.equal(done.change(x, torch.tensor([2, 2])), x)

    means = {"h": torch.tensor([[1.0, 0.0, 0.0], [3.0, 2.0, 0.0]])}
    for method, constant in (("mean", [[2.0, 1.0]] * 2), ("swap", [[3.0, 2.0], [1.0, 0.0]])):
        [made] = interventions(method, {"h": [[0, 1], [0, 1]]}, {"h": sae}, {}, 0.0, means, [0, 1]).values()
        assert made.shift.tolist() == [[2 * a, b, 0.0] for a, b in constant]


def test_the_mean_activation_is_over_all_tokens_of_a_language():
    counts = pl.DataFrame({"unit": [0, 2, 2], "language": ["en", "en", "fi"], "sum": [10.0, 5.0, 8.0]})
    totals = pl.DataFrame({"language": ["fi", "en"], "tokens": [4, 20]})
    assert _mean_activation(counts, totals, 3, ["en", "fi"]).tolist() == [[0.5, 0.0, 0.25], [0.0, 0.0, 2.0]]
