"""ARMOR: a weight as a sparse N:M core between two block-diagonal wrappers, found by exact descent.

Source: Liu et al. 2025, ARMOR, https://arxiv.org/abs/2510.05528
The paper takes one Adam step on all three factors and updates one group per block, 20 000 times. Here a round
solves the left wrapper exactly, then the right one (`wrappers`), searches and refits the core (`core`), then
moves all three together (`joint`). Each is a half-step; one that would raise the loss is not taken, so the
loss never rises and never exceeds NoWag-P's, where it starts. The paper's loop is `solver="adam"` (`adam`).
With the "gram" proxy the loss is the error of the outputs, tr(E H E^T); the paper keeps H's diagonal only.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from structprune.decide.select import mask_groups
from structprune.decide.sparsity import check_groups
from structprune.errors import QualityError, UsageError
from structprune.models.modules import folded
from structprune.solvers.armor.adam import descend_by_adam
from structprune.solvers.armor.core import START_SHARE, Core, all_supports
from structprune.solvers.armor.joint import joint_step
from structprune.solvers.armor.problem import Problem, State
from structprune.solvers.armor.wrappers import solve_left, solve_right
from structprune.solvers.effort import MASK_BYTES, VALUE_BYTES, Effort
from structprune.solvers.nowag import NormalisedWeight, importance, normalise_weight

Proxy = Literal["diagonal", "gram"]
Solver = Literal["descent", "adam"]
# Told the relative loss, after every half-step of the descent and now and then by Adam.
Watch = Callable[[float], None]

# Chosen as `core.PULL` was. For the core: steps of ADMM, conjugate-gradient steps on what it
# ends with, moves of the groups where it was refused, and conjugate-gradient steps after them.
ADMM_STEPS, ADMM_REFITS, SWEEPS, REFITS = 20, 10, 1, 5
# Conjugate-gradient steps of the joint step: in the first round, more in every later one, and at most. While
# the supports still change much, a precise step is wasted.
JOINT_FIRST, JOINT_MORE, JOINT_MOST = 20, 2, 60
# SparseGPT's: a Gram matrix of fewer tokens than inputs says nothing in some directions.
GRAM_DAMPING = 0.01
# Elements of the core worked on at once: bounds the memory that all supports of all groups take.
PIECE = 1 << 20


@dataclass(frozen=True)
class ArmorSearch:
    """What is minimised, how, and for how long.

    Attributes:
        rounds: At most so many rounds; for Adam, so many steps.
        seed: Chooses the groups that move together.
        proxy: "gram" counts the error of the outputs and needs the Gram matrix; "diagonal" ignores the
            correlation of the inputs, as the paper does.
        solver: "adam" is the paper's loop, kept to compare with.
        tolerance: Stop when a round lowers the loss by less than this fraction of it.
    """

    rounds: int = 20
    seed: int = 0
    proxy: Proxy = "diagonal"
    solver: Solver = "descent"
    tolerance: float = 1e-3


@dataclass(frozen=True)
class ArmorFactors:
    """A weight as left @ core @ right, the normalisation folded in.

    Attributes:
        left: Diagonal blocks, shape [out / b, b, b], float32.
        core: Shape [out, in], float32; exact zeros off the mask.
        right: Diagonal blocks, shape [in / c, c, c], float32.
        mask: The core's support, shape [out, in], bool, True = kept; N of every M inputs.
        initial: NoWag-P's loss, relative to that of the zero matrix.
        losses: The relative loss at the start and after every half-step; it never rises.
    """

    left: Tensor
    core: Tensor
    right: Tensor
    mask: Tensor
    initial: float
    losses: list[float]

    def dense(self) -> Tensor:
        """Return the folded product, shape [out, in]."""
        return folded(self.left, self.core, self.right)


def effort_of_armor(rows: int, inputs: int, wrapper: int | None, rounds: int, *, gram: bool) -> Effort:
    """Return what a descent takes at most, and an answer in factors.

    Args:
        rows: Outputs of the matrices.
        inputs: Their inputs.
        wrapper: Side of the wrappers' blocks; None for the paper's.
        rounds: At most so many.
        gram: The loss is that of the outputs.
    """
    # Every step multiplies by both wrappers, and for the outputs' error by the Gram matrix.
    side = wrapper or 128
    step = 4.0 * rows * inputs * side + 2.0 * rows * inputs**2 * gram
    steps = ADMM_STEPS + ADMM_REFITS + SWEEPS + REFITS + JOINT_MOST
    told = (MASK_BYTES + VALUE_BYTES) * rows * inputs + VALUE_BYTES * (rows + inputs) * side
    return Effort(products=rounds * steps * step, told_bytes=told)


@torch.no_grad()
def factorise_weight(
    weight: Tensor,
    inputs: Tensor,
    pattern: tuple[int, int] = (2, 4),
    wrapper: int | tuple[int, int] = 128,
    search: ArmorSearch = ArmorSearch(),  # frozen
    *,
    watch: Watch | None = None,
) -> ArmorFactors:
    """Factorise a weight into a sparse core between two block-diagonal wrappers.

    Args:
        weight: Shape [out, in], any float dtype.
        inputs: L2 norm of each input over all calibration tokens, shape [in], or their Gram matrix X^T X,
            shape [in, in].
        pattern: (N, M): N of every M consecutive inputs of the core stay.
        wrapper: Size of the wrappers' blocks; one for both sides or (left, right). Each divides its side; the
            right one is a multiple of M, or 1. A wrapper of 1 has nothing to add to the core's own values.
        search: What is minimised, how, and for how long.
        watch: Told the relative loss as the search goes.

    Raises:
        UsageError: A wrapper or the pattern does not fit the shape (the caller adds the tensor's name), or
            the proxy needs a Gram matrix and there is none.
        QualityError: The weight or the statistics hold numbers that are not finite.
    """
    sizes = check_sizes((weight.shape[0], weight.shape[1]), pattern, wrapper)
    normalised = normalise_weight(weight)
    if not normalised.weight.isfinite().all():
        raise QualityError("the weight holds numbers that are not finite", hint="check the checkpoint")
    norm = inputs.diagonal().clamp_min(0).sqrt() if inputs.dim() == 2 else inputs
    scale = importance(norm).sqrt()
    # The core's own values absorb a right wrapper of 1; its blocks then hold a group and are left alone.
    block = sizes[1] if sizes[1] > 1 else pattern[1]
    gram = _correlation(inputs) if search.proxy == "gram" else None
    problem = Problem(normalised.weight * scale, gram, pattern, (sizes[0], block))
    start = _nowag_start(problem, normalised, norm, scale)
    if search.solver == "adam":
        steps, seed = search.rounds, search.seed
        state, losses = descend_by_adam(problem, start, scale, steps=steps, seed=seed, watch=watch)
    else:
        state, losses = _descend_from(problem, start, search, watch, fixed_right=sizes[1] == 1)
    # The search was in the normalised and weighted scale; the wrappers take both scales back.
    left = state.left * normalised.rows.view(-1, sizes[0], 1)
    right = state.right * (normalised.columns / scale).view(-1, 1, block)
    if sizes[1] == 1:
        right = right.diagonal(dim1=1, dim2=2).reshape(-1, 1, 1)
    # A value may be zero by chance; the mask still has N of every M.
    mask = mask_groups(state.core.abs(), *pattern)
    return ArmorFactors(left, state.core, right, mask, start.loss, losses)


def _descend_from(
    problem: Problem, start: State, search: ArmorSearch, watch: Watch | None, *, fixed_right: bool
) -> tuple[State, list[float]]:
    """Descend from NoWag-P's answer; with a Gram matrix by way of the diagonal's answer."""
    if problem.gram is None:
        return _descend(problem, start, search, watch, fixed_right=fixed_right)
    # The diagonal's answer is found sooner, and the output's error only falls from there.
    easier = replace(problem, gram=None)
    first = easier.state(start.left, start.core, start.right)
    near, _ = _descend(easier, first, search, None, fixed_right=fixed_right)
    nearer = problem.state(near.left, near.core, near.right)
    if nearer.loss >= start.loss:
        return _descend(problem, start, search, watch, fixed_right=fixed_right)
    state, losses = _descend(problem, nearer, search, watch, fixed_right=fixed_right)
    return state, [start.loss, *losses]


def check_sizes(
    shape: tuple[int, int], pattern: tuple[int, int], wrapper: int | tuple[int, int]
) -> tuple[int, int]:
    """Return the sizes of the left and the right wrapper's blocks, if they fit a matrix [out, in].

    Raises:
        UsageError: A wrapper does not divide its side, M does not divide the inputs or the right wrapper, or
            the pattern has too many supports; the caller adds the tensor's name.
    """
    left, right = (wrapper, wrapper) if isinstance(wrapper, int) else wrapper
    for side, size, blocks in (("outputs", shape[0], left), ("inputs", shape[1], right)):
        if blocks < 1 or size % blocks:
            raise UsageError(
                f"shape {list(shape)}: {size} {side} do not divide into wrapper blocks of {blocks}",
                hint="choose a wrapper that divides both sides, or exclude this matrix",
            )
    check_groups(shape, pattern[1])
    if right > 1 and right % pattern[1]:
        raise UsageError(
            f"a wrapper of {right} inputs does not divide into groups of {pattern[1]}",
            hint="choose a wrapper that is a multiple of M",
        )
    all_supports(pattern)
    return left, right


def _correlation(gram: Tensor) -> Tensor:
    """Return H with ones on its diagonal, damped; an unused input correlates with none.

    Raises:
        UsageError: There are only norms.
    """
    if gram.dim() != 2:
        raise UsageError(
            'proxy "gram" needs the Gram matrix of the inputs, not their norms',
            hint="collect the Gram matrices, or --set proxy=diagonal",
        )
    if not gram.isfinite().all():
        raise QualityError("the Gram matrix holds numbers that are not finite", hint="check the texts")
    spread = gram.diagonal().double().clamp_min(0).sqrt()
    inverse = torch.where(spread > 0, 1 / spread, 0.0)
    between = gram.double() * inverse * inverse[:, None] / (1 + GRAM_DAMPING)
    return between.fill_diagonal_(1.0).float()


def _nowag_start(problem: Problem, normalised: NormalisedWeight, norm: Tensor, scale: Tensor) -> State:
    """Return NoWag-P's answer: identity wrappers around the pruned normalised weight."""
    (size_out, size_in), (out, inputs) = problem.sizes, normalised.weight.shape
    eye_out, eye_in = torch.eye(size_out).to(scale), torch.eye(size_in).to(scale)
    mask = mask_groups(normalised.score(norm), *problem.pattern)
    left, right = eye_out.repeat(out // size_out, 1, 1), eye_in.repeat(inputs // size_in, 1, 1)
    return problem.state(left, normalised.weight.masked_fill(~mask, 0), right * scale.view(-1, 1, size_in))


def _descend(
    problem: Problem,
    start: State,
    search: ArmorSearch,
    watch: Watch | None,
    *,
    fixed_right: bool,
) -> tuple[State, list[float]]:
    """Descend from a state; returns the last state and the losses after every half-step."""
    state, losses = start, [start.loss]
    generator = torch.Generator().manual_seed(search.seed)
    share = torch.full(problem.pairs(problem.target).shape[:2], START_SHARE, device=start.core.device)
    moves: list[Callable[[State, int], State]] = [
        lambda now, _: solve_left(problem, now),
        lambda now, _: solve_right(problem, now),
        lambda now, _: _move_core(problem, _balanced(now), share, generator),
        lambda now, joint: joint_step(problem, now, joint),
    ]
    if fixed_right:  # a right wrapper of 1 adds nothing: only the left one and the core move
        del moves[3], moves[1]
    for index in range(search.rounds):
        before = state.loss
        joint = min(JOINT_FIRST + index * JOINT_MORE, JOINT_MOST)
        for move in moves:
            moved = move(state, joint)
            state = moved if moved.loss < state.loss else state
            losses.append(state.loss)
            if watch is not None:
                watch(state.loss)
        if state.loss >= before * (1 - search.tolerance):
            break
    return state, losses


def _balanced(state: State) -> State:
    """Move the wrappers' scales into the core: unit columns on the left, unit rows on the right."""
    by_row, by_column = state.left.norm(dim=1), state.right.norm(dim=2)
    by_row, by_column = torch.where(by_row > 0, by_row, 1.0), torch.where(by_column > 0, by_column, 1.0)
    return replace(
        state,
        left=state.left / by_row[:, None],
        core=state.core * by_row.reshape(-1, 1) * by_column.reshape(-1),
        right=state.right / by_column[..., None],
    )


def _move_core(problem: Problem, state: State, share: Tensor, generator: torch.Generator) -> State:
    """ArmorSearch the core's supports and refit its values, piece by piece; `share` is adapted in place.

    A block that refuses what the search found moves a share of its groups, each exactly.
    """
    size_out = problem.sizes[0]
    core, residual = state.core.clone(), state.residual.clone()
    left_gram = state.left.mT @ state.left
    for part in problem.parts:
        span, right, between = problem.span(part), state.right[part], problem.between(part)
        right_gram = (right if between is None else right @ between) @ right.mT
        weighed = problem.pairs(problem.weighed(residual, span))
        values = problem.pairs(core[:, span])
        step = max(1, PIECE // (size_out * (span.stop - span.start)))
        for first in range(0, len(left_gram), step):
            piece = slice(first, first + step)
            gradient = state.left[piece, None].mT @ weighed[piece] @ right.mT
            blocks = Core(values[piece].contiguous(), gradient, left_gram[piece], right_gram, problem.pattern)
            refused = ~blocks.search(ADMM_STEPS, ADMM_REFITS)
            if refused.any():
                moved = blocks.move_groups(share[piece, part] * refused, generator, SWEEPS)
                share[piece, part] = torch.where(refused, moved, share[piece, part])
            blocks.refit(blocks.values != 0, REFITS)
            change = state.left[piece, None] @ (blocks.values - values[piece]) @ right
            rows = slice(first * size_out, (first + len(change)) * size_out)
            core[rows, span] = blocks.values.transpose(1, 2).reshape(-1, span.stop - span.start)
            residual[rows, span] += change.transpose(1, 2).reshape(-1, span.stop - span.start)
    return problem.state(state.left, core, state.right)
