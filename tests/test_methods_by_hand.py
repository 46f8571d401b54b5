"""What each weight method decides, against numbers worked out by hand and the method sheet's own checks.

The solvers have tests of their own (`test_decide_*`); here stand the methods around them.
"""

import json
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from structprune.calibration.collect import collect_inputs
from structprune.calibration.statistics import InputSums, Parts, Statistics
from structprune.decide import select
from structprune.models.arch import Linear, all_linears
from structprune.models.walk import Walk
from structprune.plan.key import Key
from structprune.plan.plan import Plan
from structprune.pruners.catalogue import find
from structprune.pruners.weight.armor import Armor
from structprune.pruners.weight.gblm import Gblm
from structprune.pruners.weight.magnitude import Magnitude
from structprune.pruners.weight.nowag import Nowag
from structprune.pruners.weight.ria import Ria
from structprune.pruners.weight.sparsegpt import Sparsegpt
from structprune.pruners.weight.thanos import Thanos
from structprune.pruners.weight.wanda import Wanda
from structprune.solvers.matrix import MatrixToPrune
from structprune.solvers.nowag import FLOOR
from tests.tiny import tiny, tokens

CPU = torch.device("cpu")
NORM: Parts = frozenset({"norm"})
BOTH: Parts = frozenset({"norm", "gram"})


def data(model: PreTrainedModel, count: int = 3) -> list[dict[str, Tensor]]:
    return [tokens(model, batch=2, length=24, seed=seed) for seed in range(count)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen_of(
    inputs: Tensor, parts: Parts = NORM, gradient: Tensor | None = None, samples: int = 0
) -> Statistics:
    """Return what is known of a matrix that reads these inputs, shape [tokens, in]."""
    sums = InputSums(parts, inputs.shape[1], CPU)
    sums.add(inputs)
    return Statistics(sums, gradient, samples)


def norm(values: list[float]) -> Statistics:
    """Return the statistics of one token with these features."""
    return seen_of(torch.tensor([values]))


def same(one: Plan, other: Plan) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def linear_of(model: PreTrainedModel, label: str) -> Linear:
    return next(one for block in all_linears(model) for one in block if one.label.endswith(label))


def output_error(model: PreTrainedModel, pruned: PreTrainedModel, label: str, inputs: Tensor) -> float:
    difference = linear_of(model, label).weight - linear_of(pruned, label).weight
    return float((inputs @ difference.T).square().sum())


class TestGblm:
    def test_by_hand(self) -> None:
        weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
        gradient = torch.tensor([[0.5, 0.0], [0.0, 0.25]])
        stat = seen_of(torch.tensor([[2.0, 1.0]]), gradient=gradient, samples=4)
        # alpha * 128 samples * the mean gradient, times sqrt(4) for a norm that was not divided by it
        one = Gblm(alpha=0.5).score(weight, stat)
        assert torch.equal(one, torch.tensor([[1 * (2 + 64.0), 2 * 1], [3 * 2, 4 * (1 + 32.0)]]))
        two = Gblm(alpha=0.5, gradient_norm="l2").score(weight, stat)
        scale = 0.5 * 128**0.5 * 2
        torch.testing.assert_close(two[0], torch.tensor([2 + 0.5 * scale, 2.0]))

    def test_with_128_samples_the_balance_is_the_papers(self) -> None:
        weight, gradients = random(4, 8), random(128, 4, 8, seed=1) / 1000
        inputs = random(128, 8, seed=2)  # one token a sample
        seen = seen_of(inputs, gradient=gradients.abs().mean(dim=0), samples=128)
        ours = Gblm().score(weight, seen)
        # The paper: the norm divided by sqrt(samples), and 100 times the sum of the gradients' sizes.
        theirs = weight.abs() * (inputs.norm(dim=0) / 128**0.5 + 100 * gradients.abs().sum(dim=0))
        torch.testing.assert_close(ours, theirs * 128**0.5)

    def test_without_the_gradient_it_is_wanda_to_the_bit(self) -> None:
        model = tiny("llama")
        assert same(Gblm(alpha=0).calibrate(model, data(model)), Wanda().calibrate(model, data(model)))
        assert not same(Gblm().calibrate(model, data(model)), Wanda().calibrate(model, data(model)))

    def test_without_activations_it_is_weight_times_gradient(self) -> None:
        weight, gradient = random(3, 8), random(3, 8, seed=1).abs()
        stat = Statistics(weight_gradient=gradient, samples=7)  # nobody has to look at the inputs
        assert torch.equal(Gblm(activations=False).score(weight, stat), weight.abs() * gradient)

    @pytest.mark.parametrize("gradient_norm", ["l1", "l2"])
    def test_samples_given_twice_change_no_mask(self, gradient_norm: str) -> None:
        model = tiny("llama")
        pruner = find("gblm").model_validate({"gradient_norm": gradient_norm})
        once = pruner.calibrate(model, data(model))
        assert same(once, pruner.calibrate(model, data(model) * 2))

    def test_end_to_end_it_is_the_score_of_the_whole_models_autograd(self) -> None:
        model = tiny("llama")
        batches = data(model)
        plan = Gblm(propagate="dense", keep_scores=True).calibrate(model, batches)
        samples = [ids for batch in batches for ids in batch["input_ids"]]
        gradients = _gradients(model, samples)
        for block in Walk(model, batches):
            seen = collect_inputs(block, block.linears, NORM, advance=True).inputs
            for linear in block.linears:
                gradient = gradients[linear.label]
                score = linear.weight.abs() * (
                    seen[linear.label].norm / len(samples) ** 0.5 + 100 * 128 * gradient
                )
                kept = plan[Key(linear.name, "score")] / len(samples) ** 0.5
                torch.testing.assert_close(kept, score, rtol=1e-4, atol=1e-5)
                mask = select.mask_rows(kept, linear.weight.shape[1] // 2)
                assert torch.equal(plan[Key(linear.name, "mask")], mask)


class TestRia:
    def test_by_hand(self) -> None:
        weight = torch.tensor([[1.0, -1.0, 2.0], [3.0, 1.0, 0.0]])  # columns sum to 4, 2, 2; rows to 4, 4
        score = Ria().score(weight, norm([4.0, 1.0, 9.0]))
        relative = torch.tensor(
            [[1 / 4 + 1 / 4, 1 / 2 + 1 / 4, 1 + 2 / 4], [3 / 4 + 3 / 4, 1 / 2 + 1 / 4, 0.0]]
        )
        assert torch.equal(score, relative * torch.tensor([2.0, 1.0, 3.0]))

    def test_without_the_activations_only_the_relative_size_counts(self) -> None:
        weight = random(4, 8)
        size = weight.abs()
        score = Ria(power=0).score(weight, norm([5.0] * 4 + [0.1] * 4))
        torch.testing.assert_close(score, size / size.sum(dim=0) + size / size.sum(dim=1, keepdim=True))

    def test_a_row_and_a_column_of_zeros_leave_first(self) -> None:
        weight = random(4, 8)
        weight[1], weight[:, 2] = 0, 0
        score = Ria().score(weight, norm([1.0] * 8))
        assert score.isfinite().all()
        keep = select.mask_lowest(score, 11, compare="matrix")
        assert not keep[1].any() and not keep[:, 2].any() and keep.sum() == 21

    def test_the_paper_ranks_the_whole_matrix(self) -> None:
        model = tiny("llama")
        plan = Ria(skip="1").calibrate(model, data(model))
        kept = plan[Key("model.layers.0.mlp.up_proj.weight", "mask")].sum(dim=1)
        assert kept.sum() == 96 * 64 // 2 and kept.min() < 32 < kept.max()


class TestNowag:
    def test_by_hand(self) -> None:
        weight = torch.tensor([[3.0, 0.0], [4.0, 2.0]])  # columns' norms 5 and 2
        scaled = weight / (torch.tensor([5.0, 2.0]) + FLOOR)
        rows = scaled.norm(dim=1, keepdim=True) + FLOOR
        score = Nowag().score(weight, norm([1.0, 3.0]))
        # the mean square of the inputs is (1 + 9) / 2
        torch.testing.assert_close(score, (scaled / rows).square() * torch.tensor([1 / 5, 9 / 5]))

    def test_two_of_four_is_wanda_on_the_normalised_weight(self) -> None:
        weight, stat = random(8, 16), norm([0.5 + place for place in range(16)])
        columns = weight / (weight.norm(dim=0) + FLOOR)
        mask = select.mask_groups(Nowag().score(weight, stat), 2, 4)
        # What a row is divided by changes no choice inside it.
        expected = select.mask_groups(Wanda().score(columns, stat), 2, 4)
        assert torch.equal(mask, expected)

    def test_later_blocks_see_dense_inputs(self) -> None:
        model = tiny("llama")
        assert Nowag().propagate == "dense"
        plans = [Nowag(propagate=how).calibrate(model, data(model)) for how in ("dense", "pruned")]
        first, second = (Key(f"model.layers.{block}.mlp.up_proj.weight", "mask") for block in (0, 1))
        assert torch.equal(plans[0][first], plans[1][first])
        assert not torch.equal(plans[0][second], plans[1][second])


class TestSparsegpt:
    def test_linears_that_read_one_input_share_one_gram_matrix(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[int] = []
        start = InputSums.__init__

        def count(self: InputSums, parts: Parts, width: int, *place: Any, **pairs: bool) -> None:
            made.append(width)
            assert parts == {"gram"}  # no norms or means are summed that nobody reads
            start(self, parts, width, *place, **pairs)

        monkeypatch.setattr(InputSums, "__init__", count)
        model = tiny("llama")
        Sparsegpt().calibrate(model, data(model))
        # q, k and v; o; gate and up; down: in either block
        assert made == [64, 64, 64, 96] * 2

    def test_it_loses_less_of_the_outputs_than_a_mask_alone(self) -> None:
        model = tiny("llama")
        batches = data(model, 8)
        block = next(iter(Walk(model, batches)))
        seen: dict[str, list[Tensor]] = {}
        block.observe(lambda _, one, inputs: seen.setdefault(one.label, []).append(inputs), block.linears)
        errors: dict[str, dict[str, float]] = {}
        for method in ("wanda", "sparsegpt", "thanos", "alps"):
            pruner = find(method).model_validate({"skip": "1"})
            pruned = pruner.apply(tiny("llama"), pruner.calibrate(model, batches))
            errors[method] = {
                label: output_error(model, pruned, label, torch.cat(parts)) for label, parts in seen.items()
            }
        for label, error in errors["wanda"].items():
            assert errors["sparsegpt"][label] < error, label
            assert errors["thanos"][label] < error, label
            assert errors["alps"][label] < errors["sparsegpt"][label], label

    def test_the_error_in_the_plan_is_half_of_the_outputs(self) -> None:
        weight, inputs = random(6, 16), random(200, 16, seed=1)
        seen = seen_of(inputs, BOTH)
        for pruner in (Sparsegpt(damping=1e-6), Thanos(damping=1e-6)):
            (found,) = pruner.solve([MatrixToPrune("x", weight, removed=48)], seen)
            assert found.weight is not None
            assert int((~found.mask).sum()) == 48
            error = (inputs @ (weight - found.weight * found.mask).T).square().sum() / 2
            assert found.facts["error"] == pytest.approx(float(error), rel=1e-3)

    def test_ranking_matrices_together_keeps_the_total(self) -> None:
        model = tiny("llama")
        apart, joint = (
            Sparsegpt(joint=joint, skip="1").calibrate(model, data(model)).blocks[0].facts["removed"]
            for joint in (False, True)
        )
        shared = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
        assert sum(apart[one] for one in shared) == sum(joint[one] for one in shared)
        assert any(apart[one] != joint[one] for one in shared)


class TestThanos:
    def test_one_weight_at_a_time_removes_what_wanda_would(self) -> None:
        weight, inputs = random(1, 8), random(50, 8, seed=1)
        seen = seen_of(inputs, BOTH)
        (found,) = Thanos().solve([MatrixToPrune("x", weight, removed=1)], seen)
        assert torch.equal(found.mask, select.mask_rows(Wanda().score(weight, seen), 1))


class TestOwl:
    @pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
    def test_the_total_is_exactly_what_was_asked(self, sparsity: float) -> None:
        model = tiny("qwen3")
        plan = (
            find("wanda")
            .model_validate({"budget": "owl", "sparsity": sparsity})
            .calibrate(model, data(model))
        )
        sizes = {one.label: one.weight.numel() for block in all_linears(model) for one in block}
        removed = {label: count for block in plan.blocks for label, count in block.facts["removed"].items()}
        total = sum(sizes.values()) * Fraction(str(sparsity))
        assert sum(removed.values()) == int(total)
        assert {f"{label}.weight": count for label, count in removed.items()} == plan.facts["budget"]
        share = [sum(block.facts["removed"].values()) for block in plan.blocks]
        outliers = plan.facts["measured"]
        # The block with more outliers loses less; two blocks lie at the two ends of the range.
        assert (share[0] < share[1]) == (outliers[0] > outliers[1])
        assert abs(share[0] - share[1]) / (sum(sizes.values()) / 2) == pytest.approx(2 * 0.08, abs=1e-3)


class TestArmor:
    def test_the_loss_of_every_matrix_is_told_and_never_rises(self) -> None:
        model = tiny("llama")
        plan = Armor(rounds=4).calibrate(model, data(model))
        told = {label: facts for block in plan.blocks for label, facts in block.facts["matrices"].items()}
        assert told.keys() == {one.label for block in all_linears(model) for one in block}
        for label, facts in told.items():
            losses = facts["losses"]
            assert losses[0] == pytest.approx(facts["nowag_loss"], rel=1e-6), label
            assert all(after <= before for before, after in pairwise(losses)), label
            assert losses[-1] < 0.9 * facts["nowag_loss"], label
            json.dumps(facts)

    def test_the_start_is_the_mask_of_nowag_and_its_loss(self) -> None:
        model = tiny("llama")
        first = next(iter(Walk(model, data(model))))
        norms = collect_inputs(first, all_linears(model)[0], NORM, advance=False)
        plan = Armor(rounds=1, skip="1").calibrate(model, data(model))
        linear = all_linears(model)[0][0]
        score = Nowag().score(linear.weight, Statistics(norms.inputs[linear.label]))
        mask = select.mask_groups(score, 2, 4)
        lost = float((score * ~mask).sum() / score.sum())
        assert plan.blocks[0].facts["matrices"][linear.label]["nowag_loss"] == pytest.approx(lost, rel=1e-4)

    @pytest.mark.parametrize("fields", [{"proxy": "gram"}, {"solver": "adam", "rounds": 20}])
    def test_the_other_proxy_and_the_papers_solver_do_not_rise_either(self, fields: dict[str, Any]) -> None:
        model = tiny("llama")
        pruner = Armor.model_validate({"rounds": 2, "include": "q_proj", **fields})
        plan = pruner.calibrate(model, data(model))
        for block in plan.blocks:
            for facts in block.facts["matrices"].values():
                assert facts["losses"][-1] <= facts["nowag_loss"]


def test_magnitude_on_equal_inputs_and_wanda_by_row_agree() -> None:
    weight, stat = random(8, 16), norm([2.0] * 16)
    one, other = Magnitude().score(weight, Statistics()), Wanda().score(weight, stat)
    assert torch.equal(select.mask_rows(one, 8), select.mask_rows(other, 8))


def test_a_score_is_the_same_whatever_else_is_collected_beside_it() -> None:
    """Score, budget and repair share one collector, which sums the union of what they ask for."""
    inputs, weight = random(40, 16), random(4, 16, seed=1)
    small, large = seen_of(inputs), seen_of(inputs, frozenset({"norm", "moments", "gram"}))
    for pruner in (Wanda(), Ria(), Nowag()):
        assert torch.equal(pruner.score(weight, small), pruner.score(weight, large))


def _gradients(model: PreTrainedModel, samples: list[Tensor]) -> dict[str, Tensor]:
    """Return the mean size of every gradient over samples, from one backward pass of the whole model each."""
    found = [one for block in all_linears(model) for one in block]
    sums = {one.label: torch.zeros_like(one.weight) for one in found}
    for ids in samples:
        model.zero_grad()
        logits = model(input_ids=ids[None], use_cache=False).logits
        functional.cross_entropy(logits[0, :-1].float(), ids[1:]).backward()
        for one in found:
            gradient = one.module.get_parameter(one.parameter).grad
            assert gradient is not None
            sums[one.label] += gradient.abs()
    model.zero_grad()
    return {label: total / len(samples) for label, total in sums.items()}
