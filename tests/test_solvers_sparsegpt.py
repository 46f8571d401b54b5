"""SparseGPT's solver: its loss is the output's error, counts are exact, and the update lowers the error."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from structprune.errors import QualityError, UsageError
from structprune.solvers.alps import solve_alps
from structprune.solvers.hessian import damp_hessian, factor_inverse
from structprune.solvers.repairs.least_squares import refit_by_least_squares
from structprune.solvers.sparsegpt import solve_sparsegpt, update_by_obs
from structprune.solvers.thanos import solve_thanos

HALF = Fraction(1, 2)


def problem(inputs: int = 64, tokens: int = 256, outs: tuple[int, ...] = (24,), seed: int = 0):
    """Weights, and the Gram matrix of inputs that are correlated as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + 0.5 * torch.eye(inputs)
    tokens_in = torch.randn(tokens, inputs, generator=generator) @ mix
    weights = [torch.randn(out, inputs, generator=generator) for out in outs]
    return weights, tokens_in.T @ tokens_in


def error(weight: Tensor, new: Tensor, hessian: Tensor) -> float:
    """Half of tr(dW H dW^T), in float64."""
    change = (weight.double() - new.double()).detach()
    return float((change @ hessian.double() * change).sum()) / 2


def column_by_column(weight: Tensor, upper: Tensor, sparsity, block: int) -> tuple[Tensor, Tensor]:
    """The paper's algorithm, written down plainly in float64, with exact counts."""
    w, u = weight.double().clone(), upper.double()
    out, inputs = w.shape
    kept = torch.ones(w.shape, dtype=torch.bool)
    for j in range(inputs):
        if isinstance(sparsity, tuple):
            if j % sparsity[1] == 0:
                here = slice(j, j + sparsity[1])
                scores = (w[:, here] / u.diagonal()[here]) ** 2
                lowest = scores.sort(dim=1, stable=True).indices[:, : sparsity[1] - sparsity[0]]
                kept[:, here] = kept[:, here].scatter(1, lowest, False)
        elif j % block == 0:
            here = slice(j, min(j + block, inputs))
            scores = ((w[:, here] / u.diagonal()[here]) ** 2).reshape(-1)
            count = int(sparsity * out * here.stop) - int(sparsity * out * j)
            flat = torch.ones_like(scores, dtype=torch.bool)
            flat[scores.sort(stable=True).indices[:count]] = False
            kept[:, here] = flat.reshape(out, -1)
        error = torch.where(kept[:, j], 0.0, w[:, j] / u[j, j])
        w[:, j:] -= error[:, None] * u[j, j:]
    return kept, torch.where(kept, w, 0.0)


def test_two_weights_by_hand() -> None:
    # H = [[2, 1], [1, 2]]: the inverse is [[2, -1], [-1, 2]] / 3, U_00^2 = 2/3 and U_11^2 = 1/2.
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    factored = factor_inverse(gram, damping=0.0)
    torch.testing.assert_close(factored.upper.square().diagonal(), torch.tensor([2 / 3, 1 / 2]))
    # Removing w_0 = 1 moves w_1 by -w_0 * Hinv_01 / Hinv_00 = 1/2 and costs w_0^2 / Hinv_00 / 2 = 3/4.
    [(mask, new, loss)] = solve_sparsegpt([torch.tensor([[1.0, 3.0]])], factored, [(1, 2)])
    assert mask.tolist() == [[False, True]]
    torch.testing.assert_close(new, torch.tensor([[0.0, 3.5]]))
    assert loss == pytest.approx(0.75)


@pytest.mark.parametrize("sparsity", [HALF, 0.7, "2:4", (1, 4), (4, 8), (20, 32)])
@pytest.mark.parametrize("block", [16, 48, 128])
def test_it_is_the_papers_algorithm(sparsity, block: int) -> None:
    [weight], gram = problem(inputs=160, outs=(20,))
    factored = factor_inverse(gram)
    [(mask, new, loss)] = solve_sparsegpt([weight], factored, [sparsity], block=block)
    amount = (2, 4) if sparsity == "2:4" else sparsity
    amount = Fraction(str(amount)) if isinstance(amount, float) else amount
    wanted_mask, wanted = column_by_column(weight, factored.upper, amount, block)
    assert torch.equal(mask, wanted_mask)
    torch.testing.assert_close(new.double(), wanted, rtol=1e-4, atol=1e-5)
    assert loss == pytest.approx(error(weight, new, damp_hessian(gram).hessian), rel=1e-4)
    torch.testing.assert_close(update_by_obs(weight, mask, factored), new, rtol=1e-4, atol=1e-5)


def test_independent_inputs_leave_kept_weights_alone() -> None:
    [weight], _ = problem()
    [(mask, new, _)] = solve_sparsegpt([weight], factor_inverse(torch.eye(64), damping=0.0), [HALF])
    assert torch.equal(new, weight * mask)


def test_on_one_mask_no_update_is_worst_and_the_exact_refit_best() -> None:
    [weight], gram = problem()
    hessian = damp_hessian(gram).hessian
    [(mask, new, _)] = solve_sparsegpt([weight], factor_inverse(gram), [HALF])
    refit, _ = refit_by_least_squares(weight, mask, gram)
    none, update, exact = (error(weight, one, hessian) for one in (weight * mask, new, refit))
    assert none > 1.2 * update > 1.2 * exact


def test_two_of_four_is_exact_in_every_group() -> None:
    weights, gram = problem(outs=(24, 8))
    for mask, new, _ in solve_sparsegpt(weights, factor_inverse(gram), ["2:4", (2, 4)]):
        assert mask.view(-1, 4).sum(1).eq(2).all()
        assert new[~mask].eq(0).all()


@pytest.mark.parametrize("inputs", [1, 5, 127, 129, 200])
@pytest.mark.parametrize("sparsity", [0.0, 0.29, Fraction(1, 3), 0.95])
def test_counts_are_exact_for_odd_sizes(inputs: int, sparsity) -> None:
    weights, gram = problem(inputs=inputs, outs=(7, 3))
    exact = sparsity if isinstance(sparsity, Fraction) else Fraction(str(sparsity))
    for joint in (False, True):
        masks = [
            mask for mask, _, _ in solve_sparsegpt(weights, factor_inverse(gram), [sparsity] * 2, joint=joint)
        ]
        removed = [int((~mask).sum()) for mask in masks]
        wanted = [int(exact * 7 * inputs), int(exact * 3 * inputs)]
        assert sum(removed) == sum(wanted)
        assert joint or removed == wanted


def test_removing_nothing_changes_nothing() -> None:
    [weight], gram = problem()
    [(mask, new, loss)] = solve_sparsegpt([weight], factor_inverse(gram), [0.0])
    assert mask.all() and torch.equal(new, weight) and loss == 0


def test_a_stack_is_solved_as_its_matrices_would_be() -> None:
    weights, gram = problem(outs=(24, 8, 40))
    factored = factor_inverse(gram)
    for sparsities in ([HALF, HALF, HALF], [HALF, "2:4", 0.7], ["2:4", (4, 8), "2:4"]):
        stacked = solve_sparsegpt(weights, factored, sparsities)
        for weight, sparsity, (mask, new, loss) in zip(weights, sparsities, stacked):
            [(alone_mask, alone, alone_loss)] = solve_sparsegpt([weight], factored, [sparsity])
            assert torch.equal(mask, alone_mask)
            torch.testing.assert_close(new, alone, rtol=1e-5, atol=1e-5)
            assert loss == pytest.approx(alone_loss, rel=1e-5)


def test_joint_ranking_shares_the_total_out_and_costs_less() -> None:
    weights, gram = problem(outs=(24, 24))
    weights[1] *= 3
    factored = factor_inverse(gram)
    alone, joint = (solve_sparsegpt(weights, factored, [HALF] * 2, joint=flag) for flag in (False, True))
    assert [int(mask.sum()) for mask, _, _ in alone] == [768, 768]
    counts = [int(mask.sum()) for mask, _, _ in joint]
    assert sum(counts) == 1536 and counts[0] < counts[1]
    assert sum(loss for *_, loss in joint) < sum(loss for *_, loss in alone)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**30])
def test_the_scale_of_the_gram_matrix_does_not_matter(scale: float) -> None:
    [weight], gram = problem()
    gram[5] = gram[:, 5] = 0
    [(mask, new, loss)] = solve_sparsegpt([weight], factor_inverse(gram), [HALF])
    [(scaled_mask, scaled, scaled_loss)] = solve_sparsegpt([weight], factor_inverse(gram * scale), [HALF])
    assert torch.equal(mask, scaled_mask) and torch.equal(new, scaled)
    assert scaled_loss == pytest.approx(loss * scale)


def test_fewer_tokens_than_inputs_are_enough() -> None:
    [weight], gram = problem(tokens=10)
    factored = factor_inverse(gram)
    assert factored.facts == {
        "damping": 0.01,
        "damping_raises": 0,
        "precision": "float32",
        "dead_inputs": 0,
    }
    [(mask, new, loss)] = solve_sparsegpt([weight], factored, [HALF])
    assert int(mask.sum()) == 24 * 32 and new.isfinite().all()
    assert loss == pytest.approx(error(weight, new, damp_hessian(gram).hessian), rel=1e-3)


def test_a_singular_matrix_without_damping_raises_it_and_says_so() -> None:
    _, gram = problem(tokens=10)
    factored = factor_inverse(gram, damping=0.0)
    assert factored.raises >= 1
    assert factored.damping == pytest.approx(1e-4 * 10 ** (factored.raises - 1))
    identity = factored.upper.T @ factored.upper @ damp_hessian(gram, factored.damping).hessian
    torch.testing.assert_close(identity, torch.eye(64), rtol=0, atol=0.05)


def test_float64_comes_before_more_damping() -> None:
    _, gram = problem(inputs=8)
    gram[7] = gram[0]
    gram[:, 7] = gram[:, 0]
    factored = factor_inverse(gram, damping=1e-9)
    assert (factored.precision, factored.raises) == ("float64", 0)


def test_a_matrix_that_no_damping_helps_is_refused() -> None:
    gram = torch.tensor([[1.0, 9.0], [9.0, 1.0]])
    with pytest.raises(QualityError, match=r"\[2, 2\] has no Cholesky factor at a damping of 1 .*exclude"):
        factor_inverse(gram)


def test_dead_inputs_leave_first_and_change_no_count() -> None:
    [weight], gram = problem(outs=(10,))
    dead = torch.tensor([3, 40, 41])
    gram[dead] = 0
    gram[:, dead] = 0
    factored = factor_inverse(gram)
    assert factored.dead.nonzero().flatten().tolist() == dead.tolist()
    [(mask, _, _)] = solve_sparsegpt([weight], factored, [HALF])
    assert int(mask.sum()) == 320
    assert not mask[:, dead].any()
    # One in ten: of the 64 that leave 30 belong to dead inputs. Of 12 that leave all do; the others stay as
    # they were.
    [(mask, new, loss)] = solve_sparsegpt([weight], factored, [Fraction(12, 640)])
    assert int((~mask[:, dead]).sum()) == int((~mask).sum()) == 12
    assert torch.equal(new, weight * mask)
    # A dead input counts as one of mean size in the loss.
    assert loss > 0


def test_a_gram_matrix_of_zeros_leaves_magnitude_to_decide() -> None:
    [weight], _ = problem(outs=(4,))
    factored = factor_inverse(torch.zeros(64, 64))
    assert factored.dead.all()
    [(mask, new, _)] = solve_sparsegpt([weight], factored, ["2:4"])
    lowest = weight.abs().view(-1, 4).sort(1).indices[:, :2]
    wanted = torch.ones(64, 4, dtype=torch.bool).scatter(1, lowest, False).view(4, 64)
    assert torch.equal(mask, wanted) and torch.equal(new, weight * mask)


def test_one_nan_is_refused_wherever_it_is() -> None:
    [weight], gram = problem()
    factored = factor_inverse(gram)
    for bad in (torch.nan, torch.inf, -torch.inf):
        gram[3, 5] = bad
        with pytest.raises(QualityError, match="Gram matrix"):
            factor_inverse(gram)
        weight[2, 7] = bad
        for solve in (
            lambda: solve_sparsegpt([weight], factored, [0.0]),
            lambda: update_by_obs(weight, weight > 0, factored),
        ):
            with pytest.raises(QualityError, match=r"\[24, 64\].* is NaN or infinite"):
                solve()
    with pytest.raises(QualityError, match="negative"):
        factor_inverse(-torch.eye(4))


def test_a_float64_gram_matrix_is_solved_in_float64() -> None:
    [weight], gram = problem(inputs=160, outs=(20,))
    found = factor_inverse(gram.double())
    exact = torch.linalg.cholesky(
        torch.linalg.inv(damp_hessian(gram, dtype=torch.float64).hessian), upper=True
    )
    torch.testing.assert_close(found.upper, exact, rtol=1e-9, atol=1e-12)
    [(mask, new, _)] = solve_sparsegpt([weight], found, [HALF])
    wanted_mask, wanted = column_by_column(weight, exact, HALF, 128)
    assert torch.equal(mask, wanted_mask) and new.dtype == torch.float64
    torch.testing.assert_close(new, wanted, rtol=1e-9, atol=1e-12)
    # Every other solver takes such a matrix too, in the precision that it works in.
    norm = gram.diagonal().sqrt()
    for solve in (
        lambda h: solve_thanos(weight, norm, factor_inverse(h), HALF)[:2],
        lambda h: solve_alps(weight, h, HALF)[:2],
        lambda h: (mask, refit_by_least_squares(weight, mask, h)[0]),
    ):
        (ours, values), (theirs, others) = solve(gram), solve(gram.double())
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(values, others.float(), rtol=1e-3, atol=1e-4)


def test_bfloat16_weights_are_read_as_float32() -> None:
    [weight], gram = problem()
    factored = factor_inverse(gram)
    [(mask, new, _)] = solve_sparsegpt([weight.bfloat16()], factored, [HALF])
    [(wanted_mask, wanted, _)] = solve_sparsegpt([weight.bfloat16().float()], factored, [HALF])
    assert new.dtype == torch.float32
    assert torch.equal(mask, wanted_mask) and torch.equal(new, wanted)


def test_what_is_given_is_only_read() -> None:
    [weight], gram = problem()
    before = weight.clone(), gram.clone()
    weight.requires_grad_()
    factored = factor_inverse(gram)
    [(mask, new, _)] = solve_sparsegpt([weight], factored, [HALF])
    update_by_obs(weight, mask, factored)
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])
    assert not new.requires_grad and new.is_contiguous() and mask.is_contiguous()


def test_impossible_requests_are_refused() -> None:
    [weight], gram = problem()
    with pytest.raises(UsageError, match="groups of 24"):
        solve_sparsegpt([weight], factor_inverse(gram), [(2, 24)])
    with pytest.raises(ValueError, match="negative"):
        factor_inverse(gram, damping=-0.1)
