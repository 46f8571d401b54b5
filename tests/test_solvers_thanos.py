"""Thanos: weight by weight it is OBS; what it removes together costs less than what leaves in order."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from structprune.decide.select import mask_matrix
from structprune.errors import QualityError, UsageError
from structprune.solvers.hessian import damp_hessian, factor_inverse
from structprune.solvers.sparsegpt import solve_sparsegpt, update_by_obs
from structprune.solvers.thanos import solve_thanos


def problem(inputs: int = 64, tokens: int = 300, out: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, the Gram matrix of inputs with a few strong common directions, and the inputs' norms."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(tokens, 8, generator=generator) @ torch.randn(8, inputs, generator=generator)
    tokens_in = common / 3 + torch.randn(tokens, inputs, generator=generator) * 0.7
    gram = tokens_in.T @ tokens_in
    return torch.randn(out, inputs, generator=generator), gram, gram.diagonal().sqrt()


def error(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    change = new.double() - weight.double()
    return float((change @ damp_hessian(gram).hessian.double() * change).sum()) / 2


def test_three_weights_by_hand() -> None:
    # H is 2 on the diagonal and 1 beside it. Of a row of ones the first two leave: the third goes up by what
    # minimises (1, 1, -x) H (1, 1, -x)^T = 6 - 4 x + 2 x^2, which is 1, and half of what is left is 2.
    gram = torch.eye(3) + 1
    mask, new, loss = solve_thanos(
        torch.ones(1, 3), torch.tensor([1.0, 1.0, 2.0]), factor_inverse(gram, damping=0.0), Fraction(2, 3)
    )
    assert mask.tolist() == [[False, False, True]]
    torch.testing.assert_close(new, torch.tensor([[0.0, 0.0, 2.0]]))
    assert loss == pytest.approx(2.0)


@pytest.mark.parametrize("sparsity", [0.3, Fraction(1, 2), 0.9, "2:4", (1, 4)])
@pytest.mark.parametrize("block", [24, 64, 128])
def test_its_loss_is_the_outputs_error_and_its_count_exact(sparsity, block: int) -> None:
    weight, gram, norm = problem()
    mask, new, loss = solve_thanos(weight, norm, factor_inverse(gram), sparsity, block=block)
    assert loss == pytest.approx(error(weight, new, gram), rel=1e-3)
    assert new[~mask].eq(0).all()
    if isinstance(sparsity, float | Fraction):
        assert int((~mask).sum()) == int(Fraction(str(sparsity)) * 64 * 24)
    else:
        assert mask.view(-1, 4).sum(1).eq(2 if sparsity == "2:4" else 1).all()


def test_weight_by_weight_it_is_obs() -> None:
    weight, gram, norm = problem()
    factored = factor_inverse(gram)
    mask, new, _ = solve_thanos(weight, norm, factored, 0.5, block=1)
    torch.testing.assert_close(new, update_by_obs(weight, mask, factored), rtol=1e-4, atol=1e-5)


def test_leaving_together_costs_less_than_leaving_in_order() -> None:
    weight, gram, norm = problem()
    factored = factor_inverse(gram)
    mask, together, _ = solve_thanos(weight, norm, factored, 0.5, block=64)
    assert torch.equal(mask, mask_matrix(weight.abs() * norm, 32 * 24))
    in_order = update_by_obs(weight, mask, factored)
    assert error(weight, together, gram) < 0.95 * error(weight, in_order, gram)
    [(_, _, chosen_in_order)] = solve_sparsegpt([weight], factored, [0.5])
    assert error(weight, together, gram) < chosen_in_order


def test_few_tokens_dead_inputs_and_bfloat16_are_fine() -> None:
    weight, gram, norm = problem(tokens=20)
    gram[5] = gram[:, 5] = 0
    norm[5] = 0
    mask, new, _ = solve_thanos(weight.bfloat16(), norm, factor_inverse(gram), 0.5)
    assert new.isfinite().all() and new.dtype == torch.float32 and not mask[:, 5].any()
    mask, new, _ = solve_thanos(weight, norm, factor_inverse(gram), Fraction(12, 64 * 24))
    assert int((~mask[:, 5]).sum()) == 12
    torch.testing.assert_close(new, weight * mask)


def test_removing_nothing_changes_nothing() -> None:
    weight, gram, norm = problem()
    mask, new, loss = solve_thanos(weight, norm, factor_inverse(gram), 0.0)
    assert mask.all() and torch.equal(new, weight) and loss == 0


def test_bad_numbers_and_patterns_are_refused() -> None:
    weight, gram, norm = problem()
    with pytest.raises(UsageError, match="groups of 24"):
        solve_thanos(weight, norm, factor_inverse(gram), (2, 24))
    weight[0, 0] = torch.nan
    with pytest.raises(QualityError, match="NaN"):
        solve_thanos(weight, norm, factor_inverse(gram), 0.5)
