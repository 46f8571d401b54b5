"""ALPS finds better supports than SparseGPT on correlated inputs, of the exact size that was asked for."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from structprune.errors import QualityError, UsageError
from structprune.solvers import alps as admm
from structprune.solvers.alps import RESIDUAL, solve_alps
from structprune.solvers.hessian import damp_hessian, factor_inverse
from structprune.solvers.sparsegpt import solve_sparsegpt


def problem(inputs: int = 64, tokens: int = 300, out: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and the Gram matrix of inputs with a few strong common directions."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, 8, generator=generator) @ torch.randn(8, inputs, generator=generator)
    tokens_in = common / 3 + torch.randn(tokens, inputs, generator=generator) * 0.7
    return torch.randn(out, inputs, generator=generator), tokens_in.T @ tokens_in


def error(weight: Tensor, new: Tensor, hessian: Tensor) -> float:
    change = new.double() - weight.double()
    return float((change @ hessian.double() * change).sum()) / 2


@pytest.mark.parametrize("sparsity", [0.5, 0.7, Fraction(4, 5), "2:4", (1, 4), (4, 8)])
@pytest.mark.parametrize("seed", [0, 1])
def test_its_error_is_below_that_of_sparsegpt(sparsity, seed: int) -> None:
    weight, gram = problem(seed=seed)
    mask, new, facts = solve_alps(weight, gram, sparsity)
    [(other, _, loss)] = solve_sparsegpt([weight], factor_inverse(gram), [sparsity])
    assert int(mask.sum()) == int(other.sum())
    assert new[~mask].eq(0).all()
    assert facts["error"] == pytest.approx(error(weight, new, damp_hessian(gram).hessian), rel=1e-4)
    assert facts["error"] < loss
    assert facts["settled"] and facts["converged"] and facts["residual"] < RESIDUAL


@pytest.mark.parametrize("sparsity", [0.5, 0.8, "2:4"])
def test_its_weights_do_as_well_as_the_best_on_its_support(sparsity) -> None:
    weight, gram = problem()
    mask, _, facts = solve_alps(weight, gram, sparsity)
    hessian = damp_hessian(gram).hessian.double()
    best = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(mask):
        best[row, kept] = torch.linalg.solve(hessian[kept][:, kept], (hessian @ weight[row].double())[kept])
    least = error(weight, best, hessian)
    assert least < facts["error"] < 1.0005 * least


@pytest.mark.parametrize("sparsity", [0.29, Fraction(1, 3), 0.95])
def test_the_support_has_the_exact_size(sparsity) -> None:
    weight, gram = problem(inputs=45, out=7)
    exact = Fraction(str(sparsity))
    mask, _, _ = solve_alps(weight, gram, sparsity)
    assert int((~mask).sum()) == int(exact * 7 * 45)
    mask, _, _ = solve_alps(weight, gram, sparsity, compare="row")
    assert (~mask).sum(1).eq(int(exact * 45)).all()


def test_groups_hold_exactly_what_the_pattern_says() -> None:
    weight, gram = problem()
    mask, _, _ = solve_alps(weight, gram, "2:4")
    assert mask.view(-1, 4).sum(1).eq(2).all()


def test_independent_inputs_need_no_search() -> None:
    weight, _ = problem()
    size = torch.linspace(0.5, 2, 64)
    mask, new, facts = solve_alps(weight, torch.diag(size**2), 0.5)
    worth = weight.square() * (size**2 + 0.01 * (size**2).mean())
    lowest = worth.flatten().argsort()[:1024]
    assert not mask.flatten()[lowest].any()
    torch.testing.assert_close(new, weight * mask, rtol=0, atol=5 * RESIDUAL)
    assert facts["settled"]


def test_a_pull_that_freezes_the_support_is_weakened(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem()
    monkeypatch.setattr(admm, "PULL", 30.0)
    _, _, weakened = solve_alps(weight, gram, 0.7)
    monkeypatch.setattr(admm, "RESTARTS", 0)
    _, _, frozen = solve_alps(weight, gram, 0.7)
    assert weakened["restarts"] > 0 == frozen["restarts"]
    assert weakened["error"] < frozen["error"]


def test_scale_and_dtype_do_not_matter() -> None:
    weight, gram = problem()
    mask, new, _ = solve_alps(weight.bfloat16(), gram, 0.7)
    scaled_mask, scaled, _ = solve_alps(weight.bfloat16().float(), gram * 2.0**-80, 0.7)
    assert torch.equal(mask, scaled_mask) and new.dtype == torch.float32
    torch.testing.assert_close(new, scaled)


def test_fewer_tokens_than_inputs_and_dead_inputs_are_fine() -> None:
    weight, gram = problem(tokens=20)
    gram[5] = gram[:, 5] = 0
    mask, new, facts = solve_alps(weight, gram, 0.5)
    assert new.isfinite().all() and facts["residual"] < RESIDUAL
    assert not mask[:, 5].any()
    mask, new, _ = solve_alps(weight, gram, 0.01)
    assert int((~mask).sum()) == int((~mask[:, 5]).sum()) == 20
    assert torch.equal(new[:, 5], (weight * mask)[:, 5])


def test_a_gram_matrix_of_zeros_leaves_magnitude_to_decide() -> None:
    weight, _ = problem()
    mask, new, _ = solve_alps(weight, torch.zeros(64, 64), 0.5)
    assert weight[mask].abs().min() > weight[~mask].abs().max()
    assert torch.equal(new, weight * mask)


def test_too_few_rounds_are_told() -> None:
    weight, gram = problem()
    mask, _, facts = solve_alps(weight, gram, 0.7, rounds=4)
    assert facts["rounds"] == 4 and not facts["settled"]
    assert int((~mask).sum()) == 1433


def test_bad_numbers_and_patterns_are_refused() -> None:
    weight, gram = problem()
    with pytest.raises(UsageError, match="groups of 24"):
        solve_alps(weight, gram, (2, 24))
    weight[0, 0] = torch.inf
    with pytest.raises(QualityError, match="weight"):
        solve_alps(weight, gram, 0.5)
    gram[3, 4] = torch.nan
    with pytest.raises(QualityError, match="Gram matrix"):
        solve_alps(weight, gram, 0.5)
