"""CFSP: the budget's sums and limits, the score by hand, and what must not change it."""

import copy

import pytest
import torch

from structprune.calibration.collect import collect_inputs
from structprune.decide.budgets.sigmoid import CAP, SigmoidBudget, mean_distance
from structprune.decide.unit_counts import Multiples, UnitCosts, UnitCounts, uneven_counts
from structprune.decide.units import unit_blocks
from structprune.errors import UsageError
from structprune.models.arch import blocks
from structprune.models.outputs import logits
from structprune.models.walk import Walk
from structprune.pruners.blockwise import Seen
from structprune.pruners.catalogue import find
from structprune.pruners.structure._width_block import width_block
from tests.tiny import tiny, tokens

DISTANCES = [0.30, 0.05, 0.06, 0.08, 0.25]


@pytest.mark.parametrize("asked", [0.1, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("gain", [0, 13.1072, 60])
def test_the_mean_is_what_was_asked_and_no_block_keeps_all(asked: float, gain: float) -> None:
    budget = SigmoidBudget(gain=gain)
    weights = budget.importance(DISTANCES)
    shares = budget.shares(weights, [96] * 5, asked)
    assert sum(shares) / 5 == pytest.approx(asked, abs=1e-12)
    assert min(shares) >= asked - asked / CAP - 1e-12
    assert max(shares) < 1
    if gain:
        assert sorted(range(5), key=shares.__getitem__) == sorted(range(5), key=lambda one: -DISTANCES[one])
    else:
        assert shares == pytest.approx([asked] * 5, abs=1e-12)


def test_multiples_of_128_hold_the_total_within_half_a_multiple() -> None:
    shares = SigmoidBudget().shares(SigmoidBudget().importance(DISTANCES), [3 * 8 * 1024] * 5, 0.3)
    there, costs = [UnitCounts(3, 1024)] * 5, [UnitCosts(0, 24)] * 5
    stay = [one.channels for one in uneven_counts(shares, there, costs, Multiples(channels=128))]
    assert all(count % 128 == 0 for count in stay)
    assert abs(sum(stay) - 5 * 1024 * 0.7) <= 64
    assert len(set(stay)) > 1


def test_the_score_by_hand() -> None:
    model = tiny("llama")
    _, block = blocks(model)[0]
    found = score(model, compat=False)
    norm = score(model, compat=True).double()
    down, up, gate = (
        getattr(block.mlp, name).weight.detach().double().abs()
        for name in ("down_proj", "up_proj", "gate_proj")
    )
    read = down * norm
    shares = (read / read.sum(dim=1, keepdim=True)).mean(dim=0)
    shares += (up / up.sum(dim=0)).mean(dim=1) + (gate / gate.sum(dim=0)).mean(dim=1)
    assert torch.allclose(found.double(), shares * norm, rtol=1e-4)
    # Sums over the axis of the mean, as in the released code: every matrix gives 1 / hidden to every channel.
    code = sum(
        (one / one.sum(dim=axis, keepdim=True)).mean(dim=axis)
        for one, axis in ((read, 0), (up, 1), (gate, 1))
    )
    assert torch.allclose(code, torch.full((96,), 3 / 64).double())


def score(model: torch.nn.Module, *, compat: bool) -> torch.Tensor:
    """Return the scores of the first block's channels."""
    pruner = find("cfsp")(compat=compat)
    known = width_block(unit_blocks(model)[0], ("channel",))
    block = next(iter(Walk(model, [tokens(model, seed=3)])))
    readers = pruner.readers(block)
    sums = collect_inputs(block, list(readers.values()), frozenset({"norm"}), advance=False)
    return pruner.score_units(known, readers, Seen(sums))["channel"]


def test_a_fused_matrix_scores_as_two() -> None:
    model = tiny("phi3")
    found = score(model, compat=False)
    _, block = blocks(model)[0]
    norm = score(model, compat=True)
    gate, up = block.mlp.gate_up_proj.weight.detach().abs().split(96)
    read = block.mlp.down_proj.weight.detach().abs() * norm
    shares = (read / read.sum(dim=1, keepdim=True)).mean(dim=0)
    shares = shares + (up / up.sum(dim=0)).mean(dim=1) + (gate / gate.sum(dim=0)).mean(dim=1)
    assert torch.allclose(found, shares * norm, rtol=1e-4)


@pytest.mark.parametrize("compat", [False, True])
def test_twice_the_same_data_and_another_order_change_nothing(compat: bool) -> None:
    model = tiny("llama")
    data = [tokens(model, seed=seed) for seed in range(3)]
    pruner = find("cfsp")(sparsity=0.4, compat=compat, budget={"name": "sigmoid", "gain": 200})
    plans = [pruner.calibrate(model, one) for one in (data, data * 2, data[::-1])]
    assert plans[0].facts["kept"] == plans[1].facts["kept"] == plans[2].facts["kept"]
    assert all(torch.equal(plans[0][key], plans[1][key]) for key in plans[0])
    # Blocks differ, and what they are worth is told for whoever gives out more by it.
    assert len({one["channels"] for one in plans[0].facts["kept"]}) == 2
    assert len(set(plans[0].facts["importance"])) == 2
    assert all(0 < one < 1 for one in plans[0].facts["importance"])


def test_the_distance_is_a_mean_over_tokens() -> None:
    cosines = torch.tensor([1.0, 0.0, -1.0])
    assert mean_distance(cosines) == pytest.approx(0.5)
    assert mean_distance(cosines.repeat(7)) == pytest.approx(0.5)


def test_dead_channels_leave_first_and_nothing_changes() -> None:
    model = tiny("llama")
    with torch.no_grad():
        for _, block in blocks(model):
            block.mlp.up_proj.weight[5:45] = 0
    data = [tokens(model)]
    dense = logits(copy.deepcopy(model), data[0])
    pruner = find("cfsp")(sparsity=0.3, budget={"name": "sigmoid", "gain": 0})
    pruner.apply(model, pruner.calibrate(model, data))
    assert all(len(block.mlp.up_proj.weight) < 96 for _, block in blocks(model))
    assert torch.allclose(logits(model, data[0]), dense, atol=1e-5)


def test_attention_stays_whole_and_may_not_be_asked_for() -> None:
    model = tiny("llama")
    plan = find("cfsp")(sparsity=0.5).calibrate(model, [tokens(model)])
    assert not any("self_attn" in key.name for key in plan)

    with pytest.raises(UsageError, match="units"):
        find("cfsp")().with_field("units", ["kv_group"])
