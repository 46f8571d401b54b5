"""Which units of depth leave, worked out by hand."""

import math
from collections.abc import Mapping
from fractions import Fraction

import pytest
import torch

from structprune.decide.depth import (
    DepthGoal,
    DepthKind,
    DepthUnit,
    depth_units,
    keeps_without,
    least_harm,
    lowest_units,
    nearest_span,
    random_scores,
    span_distance,
)
from structprune.errors import QualityError
from structprune.models.arch import arch_of, blocks
from structprune.models.groups import BlockKeep
from tests.tiny import tiny


def units(*parameters: int, kind: DepthKind = "block") -> list[DepthUnit]:
    return [DepthUnit(index, kind, size) for index, size in enumerate(parameters)]


def share(target: float, most: int = 3) -> DepthGoal:
    return DepthGoal(Fraction(target), counted=False, most=most)


def test_the_lowest_leave_until_the_parameters_are_nearest() -> None:
    found = units(10, 10, 10, 10)
    scores = dict(zip(found, (0.3, 0.1, 0.1, 0.2), strict=True))
    for target, left in (
        (4, []),
        (5, []),
        (6, [1]),
        (15, [1]),
        (16, [1, 2]),
        (30, [1, 2, 3]),
        (40, [1, 2, 3]),
    ):
        assert [unit.block for unit in lowest_units(scores, share(target))] == left
    assert lowest_units(scores, DepthGoal(Fraction(2), counted=True, most=3)) == [found[1], found[2]]


def test_unequal_units_leave_in_the_order_of_their_scores() -> None:
    found = units(10, 100, 10)
    scores = dict(zip(found, (0.1, 0.2, 0.3), strict=True))
    # The second would overshoot by more than what lacks; the third must not overtake it.
    assert lowest_units(scores, share(30)) == [found[0]]
    assert lowest_units(scores, DepthGoal(Fraction(2), counted=True, most=3)) == found[:2]


def test_a_span_is_of_neighbours_and_leaves_out_what_may_not_leave() -> None:
    found = [unit for unit in units(10, 10, 10, 10, 10) if unit.block != 2]
    distances = {(0, 1): 0.5, (1, 1): 0.4, (3, 1): 0.3, (4, 1): 0.9, (0, 2): 0.6, (3, 2): 0.7}
    span, value = nearest_span(found, lambda *at: distances[at], share(20))
    assert ([unit.block for unit in span], value) == ([0, 1], 0.6)
    span, value = nearest_span(found, lambda *at: distances[at], share(10))
    assert ([unit.block for unit in span], value) == ([3], 0.3)
    # Three neighbours there are not: the longest span is the nearest that can be.
    assert len(nearest_span(found, lambda *at: distances[at], share(30))[0]) == 2


def test_the_distance_of_a_span_is_the_mean_angle_between_its_ends() -> None:
    states = [torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 3.0], [2.0, 0.0]])]
    assert span_distance(states, 0, 1) == pytest.approx(0.25)


def test_each_trial_is_without_what_left_before_it() -> None:
    found = [*units(4, 4, kind="attention"), *units(8, 8, kind="mlp")]
    harm = {("attention", 0): 3.0, ("attention", 1): 1.0, ("mlp", 0): 2.0, ("mlp", 1): 5.0}
    asked: list[set[tuple[str, int]]] = []

    def loss(keeps: Mapping[int, BlockKeep]) -> float:
        off = {
            (kind, index)
            for index, keep in keeps.items()
            for kind in ("attention", "mlp")
            if not getattr(keep, kind)
        }
        asked.append(off)
        both = {("attention", 1), ("mlp", 0)} <= off
        return sum(harm[one] for one in off) + 10 * both

    assert least_harm(found, loss, DepthGoal(Fraction(2), counted=True, most=3)) == {
        found[1]: 1.0,
        found[0]: 4.0,
    }
    assert len(asked) == 4 + 3 and all(("attention", 1) in off for off in asked[4:])
    asked.clear()
    assert list(least_harm(found, loss, share(4))) == [found[1]] and len(asked) == 4
    with pytest.raises(QualityError, match="not finite"):
        least_harm(found, lambda keeps: math.inf, share(8))


def test_chance_draws_the_same_again() -> None:
    found = units(1, 1, 1, 1)
    assert random_scores(found, 1) == random_scores(found, 1) != random_scores(found, 2)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral"])
def test_units_have_the_parameters_of_their_modules(family: str) -> None:
    model = tiny(family)
    arch, found = arch_of(model), blocks(model)
    whole = depth_units(found, arch, ["block"])
    parts = depth_units(found, arch, ["attention", "mlp"])
    for index, (_, block) in enumerate(found):
        sizes = {name: one.numel() for name, one in block.named_parameters()}
        norms = sum(size for name, size in sizes.items() if "norm" in name or "ln_" in name)
        assert whole[index].parameters == sum(sizes.values())
        assert sum(one.parameters for one in parts if one.block == index) == sum(sizes.values()) - norms
    keeps = keeps_without([parts[0], parts[1], parts[3]])
    assert keeps == {0: BlockKeep(attention=False, mlp=False), 1: BlockKeep(mlp=False)}
