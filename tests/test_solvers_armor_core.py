"""The core between fixed wrappers: its moves are exact, never raise a block's loss, and keep the gradient."""

from copy import deepcopy
from itertools import product

import pytest
import torch
from torch import Tensor

from structprune.decide import select
from structprune.solvers.armor.core import Core, supports


def problem(out: int = 8, inputs: int = 16, *, pattern: tuple[int, int] = (2, 4), seed: int = 0) -> Core:
    """Return 2 x 3 blocks pruned by size, between correlated wrappers, float64."""
    draw = torch.Generator().manual_seed(seed)
    left = torch.randn(2, 2 * out, out, generator=draw, dtype=torch.float64)
    right = torch.randn(3, inputs, 2 * inputs, generator=draw, dtype=torch.float64)
    left, right = left.mT @ left, right @ right.mT
    dense = torch.randn(2, 3, out, inputs, generator=draw, dtype=torch.float64)
    values = dense * select.mask_groups(dense.abs().flatten(0, -2), *pattern).view(dense.shape)
    return Core(values, left[:, None] @ (values - dense) @ right, left, right, pattern)


def losses(core: Core, start: Core) -> Tensor:
    """Each block's loss above its start's, from the values alone."""
    step = core.values - start.values
    return (step * (2 * start.gradient + core.left[:, None] @ step @ core.right)).sum((2, 3))


def consistent(core: Core, start: Core) -> bool:
    true = start.gradient + core.left[:, None] @ (core.values - start.values) @ core.right
    return torch.allclose(core.gradient, true, rtol=1e-9, atol=1e-9)


def moved(core: Core) -> Core:
    """The same after many moves of sampled groups, at which hardly a group gains by moving alone."""
    draw, share = torch.Generator().manual_seed(0), torch.full(core.values.shape[:2], 0.3)
    core.move_groups(share, draw, 200)
    core.refit(core.values != 0, 200)
    return core


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_no_step_raises_a_blocks_loss_and_the_gradient_stays_true(pattern: tuple[int, int]) -> None:
    start = problem(pattern=pattern)
    steps = {
        "search": lambda core: core.search(20, 5),
        "move": lambda core: core.move_groups(torch.ones(2, 3), torch.Generator().manual_seed(0), 3),
        "refit": lambda core: core.refit(core.values != 0, 3),
    }
    for name, step in steps.items():
        core = deepcopy(start)
        step(core)
        assert (losses(core, start) < 0).all(), name
        assert consistent(core, start), name
        kept, of = pattern
        assert ((core.values != 0).unflatten(-1, (-1, of)).sum(-1) == kept).all(), name


def test_the_search_goes_deeper_than_moves_of_groups() -> None:
    for seed in range(5):
        start = problem(seed=seed)
        searched, single = deepcopy(start), moved(deepcopy(start))
        searched.search(50, 200)
        assert losses(searched, start).sum() < losses(single, start).sum(), seed


def test_the_search_comes_close_to_the_best_of_all_supports() -> None:
    reached, best, worst = 0.0, 0.0, 0.0
    choices = supports((2, 4))
    for seed in range(10):
        start = problem(1, 12, seed=seed)
        core = deepcopy(start)
        core.search(50, 50)
        reached += float(losses(core, start).sum())
        for row, column in product(range(2), range(3)):
            curve = start.left[row] * start.right[column]
            pull = curve @ start.values[row, column, 0] - start.gradient[row, column, 0]
            now = start.values[row, column, 0]
            here = float(now @ curve @ now - 2 * pull @ now)
            found = []
            for choice in product(choices, repeat=3):
                at = torch.cat([4 * group + one for group, one in enumerate(choice)])
                found.append(-float(pull[at] @ torch.linalg.solve(curve[at][:, at], pull[at])) - here)
            best, worst = best + min(found), worst + sum(found) / len(found)
    assert best <= reached < 0.9 * best < 0 < worst


def test_a_group_that_moves_alone_takes_its_best_support_and_values() -> None:
    start = problem(1, 4)
    core = deepcopy(start)
    core.move_groups(torch.ones(2, 3), torch.Generator().manual_seed(0), 1)
    for row, column in product(range(2), range(3)):
        curve = start.left[row, 0, 0] * start.right[column]
        pull = curve @ start.values[row, column, 0] - start.gradient[row, column, 0]
        answers = []
        for choice in supports((2, 4)):
            values = torch.zeros(4, dtype=torch.float64)
            values[choice] = torch.linalg.solve(curve[choice][:, choice], pull[choice])
            answers.append((float(values @ curve @ values - 2 * pull @ values), values))
        torch.testing.assert_close(core.values[row, column, 0], min(answers)[1], rtol=1e-4, atol=1e-5)


def test_the_refit_ends_where_the_kept_values_have_no_gradient() -> None:
    core = problem()
    kept = core.values != 0
    core.refit(kept, 300)
    assert (core.gradient[kept].abs() < 1e-6 * core.gradient.abs().max()).all()
    assert not core.values[~kept].any()
