"""The refit is the best that a mask allows, whatever solves it; DSnoT's swaps bring the output closer."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from structprune.decide.select import mask_groups, mask_matrix, mask_rows
from structprune.errors import QualityError
from structprune.solvers.conjugate_gradients import solve_rows_by_conjugate_gradients
from structprune.solvers.hessian import damp_hessian
from structprune.solvers.repairs.dsnot import Dsnot, swap_weights
from structprune.solvers.repairs.least_squares import refit_by_least_squares


def problem(inputs: int = 48, tokens: int = 200, out: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + 0.5 * torch.eye(inputs)
    tokens_in = torch.randn(tokens, inputs, generator=generator) @ mix
    return torch.randn(out, inputs, generator=generator), tokens_in.T @ tokens_in


def refit_row_by_row(weight: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """The normal equations of each row in float64."""
    new = torch.zeros(weight.shape, dtype=torch.float64)
    for row, kept in enumerate(mask):
        target = hessian.double()[kept] @ weight[row].double()
        new[row, kept] = torch.linalg.solve(hessian.double()[kept][:, kept], target)
    return new


def error(weight: Tensor, new: Tensor, hessian: Tensor) -> float:
    change = new.double() - weight.double()
    return float((change @ hessian.double() * change).sum()) / 2


MASKS = {
    "rows": lambda weight: mask_rows(weight.abs(), 24),
    "2:4": lambda weight: mask_groups(weight.abs(), 2, 4),
    "matrix": lambda weight: mask_matrix(weight.abs(), 700),
    "nothing": lambda weight: torch.ones_like(weight, dtype=torch.bool),
    "everything": lambda weight: torch.zeros_like(weight, dtype=torch.bool),
    "uneven": lambda weight: torch.arange(48) < torch.arange(0, 40, 2)[:, None],
}


def test_two_weights_by_hand() -> None:
    # min over v of 2 (1 - 0)^2 + 2 (3 - v)^2 + 2 (1 - 0)(3 - v): v = 3 + 1/2, as by SparseGPT from the left.
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    mask = torch.tensor([[False, True]])
    new, facts = refit_by_least_squares(torch.tensor([[1.0, 3.0]]), mask, gram, damping=0.0)
    torch.testing.assert_close(new, torch.tensor([[0.0, 3.5]]))
    assert facts == {"error_before": 1.0, "error": pytest.approx(0.75), "method": "cholesky"}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    ("limit", "method"), [(2**26, "cholesky"), (80_000, "cholesky"), (0, "conjugate_gradients")]
)
def test_every_way_solves_the_normal_equations(kind: str, limit: int, method: str) -> None:
    weight, gram = problem()
    mask, hessian = MASKS[kind](weight), damp_hessian(gram).hessian
    new, facts = refit_by_least_squares(weight, mask, gram, limit=limit)
    wanted = refit_row_by_row(weight, mask, hessian)
    torch.testing.assert_close(new.double(), wanted, rtol=1e-3, atol=1e-4)
    assert new[~mask].eq(0).all()
    assert facts["method"] == method or kind == "everything"
    assert facts["error"] == pytest.approx(error(weight, wanted, hessian), rel=1e-4, abs=1e-4)
    assert facts["error_before"] == pytest.approx(error(weight, weight * mask, hessian), rel=1e-4)
    assert facts.get("residual", 0) < 1e-4


def test_directions_that_no_token_showed_keep_their_weights() -> None:
    weight, gram = problem(tokens=10)
    gram[7] = gram[:, 7] = 0
    mask = mask_rows(weight.abs(), 24)
    for limit in (2**26, 0):
        new, _ = refit_by_least_squares(weight, mask, gram, limit=limit)
        torch.testing.assert_close(new[:, 7], (weight * mask)[:, 7], rtol=1e-4, atol=1e-6)
        assert new.abs().max() < 10 * weight.abs().max()
        nothing, _ = refit_by_least_squares(weight, mask, torch.zeros(48, 48), limit=limit)
        torch.testing.assert_close(nothing, weight * mask)


def test_the_scale_of_the_gram_matrix_does_not_matter() -> None:
    weight, gram = problem()
    mask = mask_rows(weight.abs(), 24)
    for limit in (2**26, 0):
        new, _ = refit_by_least_squares(weight, mask, gram, limit=limit)
        for scale in (2.0**-80, 2.0**20):
            scaled, _ = refit_by_least_squares(weight, mask, gram * scale, limit=limit)
            assert torch.equal(new, scaled)


def test_bfloat16_weights_are_read_as_float32() -> None:
    weight, gram = problem()
    mask = mask_rows(weight.abs(), 24)
    new, _ = refit_by_least_squares(weight.bfloat16(), mask, gram)
    wanted, _ = refit_by_least_squares(weight.bfloat16().float(), mask, gram)
    assert new.dtype == torch.float32 and torch.equal(new, wanted)


def test_what_cannot_be_solved_is_refused() -> None:
    weight, gram = problem()
    mask = torch.ones_like(weight, dtype=torch.bool)
    with pytest.raises(QualityError, match="raise the damping"):
        refit_by_least_squares(weight, mask, torch.ones(48, 48), damping=0.0)
    weight[3, 3] = torch.nan
    with pytest.raises(QualityError, match=r"weight of \[20, 48\] is NaN"):
        refit_by_least_squares(weight, mask, gram)
    gram[1, 1] = torch.nan
    with pytest.raises(QualityError, match="Gram matrix"):
        refit_by_least_squares(weight, mask, gram)


def test_iterating_in_vain_is_told(caplog: pytest.LogCaptureFixture) -> None:
    weight, gram = problem()
    hessian, mask = damp_hessian(gram).hessian, mask_rows(weight.abs(), 24)
    with caplog.at_level(logging.WARNING):
        _, facts = solve_rows_by_conjugate_gradients(weight, mask, hessian, weight, iterations=2)
    assert facts["iterations"] == 2 and not facts["converged"] and facts["residual"] > 1e-3
    assert "stopped after 2 iterations" in caplog.text


def swap(weight: Tensor, mask: Tensor, mean: Tensor, variance: Tensor, norm: Tensor, **fields: Any) -> Tensor:
    pattern = fields.pop("pattern", None)
    return swap_weights(weight, mask, mean, variance, norm, how=Dsnot(**fields), pattern=pattern)


def missing(weight: Tensor, mask: Tensor, mean: Tensor) -> Tensor:
    return (weight * mean).masked_fill(mask, 0).sum(1)


def test_one_swap_by_hand() -> None:
    # Missing: 3. When input 0 returns, input 3 would be the least important to leave for it, but it has the
    # same sign; input 2 has the other, and leaves -1 missing, which is closer to zero than 3.
    weight = torch.tensor([[3.0, 4.0, -1.0, 0.5]])
    mask = torch.tensor([[False, True, True, True]])
    ones = torch.ones(4)
    assert swap(weight, mask, ones, ones, ones).tolist() == [[True, True, False, True]]
    # With a norm that makes input 2 dear nothing changes: it is the only one with the right sign.
    norm = torch.tensor([1.0, 1.0, 9.0, 1.0])
    assert swap(weight, mask, ones, ones, norm).tolist() == [[True, True, False, True]]
    # |e| of 3 is small enough for this threshold.
    assert torch.equal(swap(weight, mask, ones, ones, ones, threshold=4.0), mask)
    # In groups of two input 0 could only change places with input 1, which has the wrong sign.
    pairs = torch.tensor([[False, True, True, False]])
    apart = torch.tensor([[3.0, 4.0, -1.0, -0.5]])
    assert torch.equal(swap(apart, pairs, ones, ones, ones, pattern=(1, 2)), pairs)
    # The return of input 0 would leave -5 for 3.
    heavy = torch.tensor([[3.0, 4.0, -5.0, 0.5]])
    assert torch.equal(swap(heavy, mask, ones, ones, ones), mask)


def test_a_large_variance_holds_a_weight_back() -> None:
    weight = torch.tensor([[2.0, 2.5, -1.0, 4.0]])
    mask = torch.tensor([[False, False, True, True]])
    ones, variance = torch.ones(4), torch.tensor([1.0, 9.0, 1.0, 1.0])
    assert swap(weight, mask, ones, ones, ones, rounds=1).tolist() == [[False, True, False, True]]
    assert swap(weight, mask, ones, variance, ones, rounds=1).tolist() == [[True, False, False, True]]
    assert swap(weight, mask, ones, variance, ones, rounds=1, power=0).tolist() == [
        [False, True, False, True]
    ]


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 8)])
def test_swaps_never_miss_more_and_keep_the_counts(pattern: tuple[int, int] | None) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 64, generator=generator)
    mean, deviation = torch.randn(64, generator=generator), torch.rand(64, generator=generator) + 0.1
    norm = (mean**2 + deviation**2).sqrt()
    mask = mask_groups(weight.abs() * norm, *pattern) if pattern else mask_rows(weight.abs() * norm, 40)
    before = missing(weight, mask, mean)
    size = pattern[1] if pattern else 64
    for count in (1, 2, 3, 5, 50):
        new = swap(weight, mask, mean, deviation**2, norm, rounds=count, pattern=pattern)
        assert torch.equal(new.view(40, -1, size).sum(2), mask.view(40, -1, size).sum(2))
        after = missing(weight, new, mean)
        assert (after.abs() <= before.abs() + 1e-5).all()
        before = after
    assert before.abs().mean() < 0.4 * missing(weight, mask, mean).abs().mean()


def test_inputs_without_a_mean_leave_the_mask_alone() -> None:
    weight, _ = problem()
    mask = mask_rows(weight.abs(), 24)
    zeros, ones = torch.zeros(48), torch.ones(48)
    assert torch.equal(swap(weight, mask, zeros, ones, ones, threshold=0.0), mask)
    # A dead input has neither mean nor variance; it never returns.
    mean = torch.randn(48, generator=torch.Generator().manual_seed(3))
    mean[9] = 0
    variance = torch.where(mean == 0, 0.0, 1.0)
    new = swap(weight, mask, mean, variance, ones)
    assert not (new & ~mask)[:, 9].any()
