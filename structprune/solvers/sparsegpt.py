"""SparseGPT's solver: remove weights column by column, and let those to the right make up for it.

All matrices that read the same input are solved as one stack of rows, with one factor of one Hessian.

Source: Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774

We deviate from the released code in two ways. Counts are exact: the code removes one weight too many in every
block of columns. An input that was zero on every token loses its weights first, but no more weights leave for
its sake; the code zeroes them on top.

The order of the columns matters to the result, here as in the paper: an error is passed on to the right only.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from structprune.decide.counts import removed_count
from structprune.decide.select import mask_groups, mask_matrix
from structprune.decide.sparsity import Amount, check_groups, pattern_of
from structprune.solvers.hessian import InverseFactor, read_weight

Solved = tuple[Tensor, Tensor, float]
"""Mask [out, in], bool; new weight [out, in], in the factor's precision, zero where removed; loss."""

# What is asked about some columns: weights [columns, rows] as they are now, and the index of the first.
Choose = Callable[[Tensor, int], Tensor]  # which of them stay
Score = Callable[[Tensor, int], Tensor]  # what removing each costs

# The paper's; wide enough for products of matrices, narrow enough that a mask follows the updates.
BLOCK = 128
# Columns solved one by one; wider pieces are split in two, so that products of matrices do most of the work.
LEAF = 16


def solve_sparsegpt(
    weights: Sequence[Tensor],
    factored: InverseFactor,
    sparsities: Sequence[Amount],
    *,
    block: int = BLOCK,
    joint: bool = False,
) -> list[Solved]:
    """Choose masks and update the weights that stay, for matrices that read the same input.

    A fraction is ranked over a whole block of columns at once, with the weights as the columns to the left
    have left them; a matrix loses exactly floor(fraction * out * in). N:M is ranked group by group.

    Args:
        weights: Matrices [out, in] of any float dtype; `out` may differ.
        factored: The factor of their inputs' inverse Hessian.
        sparsities: How much leaves, one per matrix.
        block: Columns ranked together for a fraction.
        joint: Rank the rows of all matrices with a fraction together, so that the total is shared out
            between them, instead of each matrix on its own as in the paper. N:M does not change.

    Returns:
        For each matrix its mask, its new weight and its loss: half of tr(dW H dW^T) with the damped H.

    Raises:
        UsageError: The inputs do not divide into groups of M.
        QualityError: A weight is NaN or infinite.
    """
    stacks: dict[tuple[int, int] | None, list[int]] = {}
    for index, sparsity in enumerate(sparsities):
        stacks.setdefault(pattern_of(sparsity), []).append(index)
    solved: dict[int, Solved] = {}
    for shape, members in stacks.items():
        outs = [len(weights[index]) for index in members]
        if shape is not None:
            check_groups((sum(outs), len(factored.upper)), shape[1])
            choose, step = _in_groups(factored, *shape), shape[1]
        else:
            amounts = [sparsities[index] for index in members]
            choose, step = _in_blocks(factored, outs, amounts, joint=joint), block
        stack = [weights[index] for index in members]
        solved.update(zip(members, _solve(stack, factored, choose, step)))
    return [solved[index] for index in range(len(weights))]


def update_by_obs(weight: Tensor, mask: Tensor, factored: InverseFactor, *, block: int = BLOCK) -> Tensor:
    """Return the weight [out, in] with what a given mask removes made up for: Optimal Brain Surgeon's update.

    As in SparseGPT each column's error moves on to the columns at its right. The result is in the precision
    of the factor.

    Args:
        weight: Shape [out, in], any float dtype.
        mask: Shape [out, in], bool, True = kept.
        factored: The factor of the input's inverse Hessian.
        block: Columns at a time; it changes speed and rounding only.

    Raises:
        QualityError: A weight is NaN or infinite.
    """
    kept = mask.T
    chosen = _solve([weight], factored, lambda columns, first: kept[first : first + len(columns)], block)
    return chosen[0][1]


def _in_blocks(factored: InverseFactor, outs: list[int], amounts: Sequence[Amount], *, joint: bool) -> Choose:
    """Choose by fractions, ranking each matrix of a stack, or the stack, over the columns that are given."""
    score = _score(factored)
    bounds = [sum(outs[:index]) for index in range(len(outs) + 1)]

    def leaving(index: int, columns: int) -> int:
        return removed_count(outs[index] * columns, amounts[index])

    def choose(columns: Tensor, first: int) -> Tensor:
        # Rounding the total so far, and not each block, makes the counts of all blocks add up.
        last = first + len(columns)
        counts = [leaving(index, last) - leaving(index, first) for index in range(len(outs))]
        scores = score(columns, first).T
        if joint:
            return mask_matrix(scores, sum(counts)).T
        parts = zip(bounds, bounds[1:], counts)
        return torch.cat([mask_matrix(scores[start:end], count) for start, end, count in parts]).T

    return choose


def _in_groups(factored: InverseFactor, kept: int, of: int) -> Choose:
    """Choose the best `kept` of the `of` columns that are given, in every row."""
    score = _score(factored)
    return lambda columns, first: mask_groups(score(columns, first).T.contiguous(), kept, of).T


def _score(factored: InverseFactor) -> Score:
    """Score by w^2 / U_jj^2; the weights of dead inputs score below all others."""
    price = factored.upper.diagonal()[:, None].square().reciprocal()
    any_dead = bool(factored.dead.any())

    def score(columns: Tensor, first: int) -> Tensor:
        here = slice(first, first + len(columns))
        scores = columns.square().mul_(price[here])
        if any_dead:
            # Negative, and still growing with the weight: where all inputs are dead, magnitude decides.
            dead = factored.dead[here]
            scores[dead] = -1 / (columns[dead].square() + 1e-30)  # the tiny number keeps a zero weight finite
        return scores

    return score


def _solve(weights: Sequence[Tensor], factored: InverseFactor, choose: Choose, step: int) -> list[Solved]:
    """Solve a stack of matrices; `choose` is asked for `step` columns at a time."""
    dense = [read_weight(weight, factored.upper.dtype) for weight in weights]
    outs = [len(weight) for weight in dense]
    # One buffer serves the stack on its way in, the errors, and the stack on its way out: fresh memory costs
    # as much as the work on it.
    buffer = dense[0].new_empty(sum(outs), dense[0].shape[1])
    torch.cat(dense, out=buffer)
    # Transposed, so that a column of the weights is contiguous: the loop goes over columns. The stack is
    # turned as a whole, there and back: torch turns a matrix quickly but a part of one slowly.
    columns = buffer.T.clone(memory_format=torch.contiguous_format)
    errors = buffer.view(columns.shape)
    kept = _sweep(columns, errors, factored.upper, choose, step)
    losses = torch.split(errors.square_().sum(0).double() / 2, outs)
    # Faster than filling by the mask; adding zero turns -0.0 into 0.0.
    columns.mul_(kept).add_(0.0)
    masks, parts = torch.split(kept.T.contiguous(), outs), torch.split(buffer.copy_(columns.T), outs)
    # Cloned, so that no result keeps the stack alive.
    return [(mask.clone(), part.clone(), float(loss.sum())) for mask, part, loss in zip(masks, parts, losses)]


def _sweep(columns: Tensor, errors: Tensor, upper: Tensor, choose: Choose, step: int) -> Tensor:
    """Go over the columns from left to right, in place; fill in their errors; return what was chosen.

    Removing weight j changes those to its right by -error_j * U_jk, where error_j = w_j / U_jj. The columns
    are halved until a piece is small. The errors of a left half reach its right half as one product, and
    within a piece a column collects what the columns before it have left: all work stays in the cache.
    """
    kept = torch.empty(columns.shape, dtype=torch.bool, device=columns.device)
    inverse = upper.diagonal().reciprocal()[:, None]

    def solve(first: int, last: int, chosen: bool = False) -> None:
        if last - first <= step and not chosen:
            kept[first:last] = choose(columns[first:last], first)
            chosen = True
        if last - first <= min(LEAF, step):
            _solve_one_by_one(
                columns[first:last],
                errors[first:last],
                upper[first:last, first:last],
                ~kept[first:last] * inverse[first:last],
            )
            return
        # Halves end where a choice ends: `choose` must see its columns after all updates from their left.
        unit = step if last - first > step else LEAF
        middle = first + unit * -(-(last - first) // (2 * unit))
        solve(first, middle, chosen)
        columns[middle:last].addmm_(upper[first:middle, middle:last].T, errors[first:middle], alpha=-1)
        solve(middle, last, chosen)

    solve(0, len(columns))
    return kept


def _solve_one_by_one(columns: Tensor, errors: Tensor, upper: Tensor, factors: Tensor) -> None:
    """Remove weights of a few columns, in place, and note their errors.

    Args:
        columns: Weights, shape [columns, rows].
        errors: To be filled, shape [columns, rows].
        upper: Their part of U, shape [columns, columns].
        factors: 1 / U_jj where a weight leaves, 0 where it stays, shape [columns, rows].
    """
    for index, (column, error, factor) in enumerate(zip(columns, errors, factors)):
        if index:
            column.addmv_(errors[:index].T, upper[:index, index], alpha=-1)
        torch.mul(column, factor, out=error)
