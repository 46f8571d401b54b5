"""DSnoT: swap kept for removed weights until the expected output is what it was; no weight changes.

Source: Zhang et al. 2023, https://arxiv.org/abs/2310.08915
"""

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from structprune.calibration.statistics import Parts
from structprune.solvers.effort import Effort
from structprune.solvers.matrix import MatrixToPrune, PrunedMatrix
from structprune.solvers.repairs.repair import Repair


class Dsnot(Repair):
    """Swap weights, row by row, so that the mean of each output comes back.

    Args:
        name: "dsnot".
        rounds: How many swaps a row may make.
        threshold: How much of an output may be missing, summed over a sample's tokens as in the paper.
        power: How much the variance of an input counts against bringing its weight back.
    """

    name: Literal["dsnot"] = "dsnot"
    rounds: Annotated[int, Field(ge=1)] = 50
    threshold: Annotated[float, Field(ge=0)] = 0.1
    power: Annotated[float, Field(ge=0)] = 1.0

    parts: ClassVar[Parts] = frozenset({"norm", "moments"})

    def effort(self, rows: int, inputs: int) -> Effort:
        """Return what the rounds take at most: each looks once at every weight."""
        return Effort(ranked=self.rounds * rows * inputs)

    def _repair(self, matrix: MatrixToPrune, pruned: PrunedMatrix) -> PrunedMatrix:
        seen = matrix.seen
        mask = swap_weights(
            matrix.weight.float(),
            pruned.mask,
            # The paper's mean is that of the samples' sums, and its threshold holds in that scale.
            seen.mean * (seen.tokens / max(seen.samples, 1)),
            seen.variance,
            seen.norm,
            how=self,
            pattern=matrix.pattern,
        )
        return replace(pruned, mask=mask)


def swap_weights(
    weight: Tensor,
    mask: Tensor,
    mean: Tensor,
    variance: Tensor,
    norm: Tensor,
    *,
    how: Dsnot,
    pattern: tuple[int, int] | None = None,
) -> Tensor:
    """Swap kept for removed weights, row by row, until the expected output is what it was; no weight changes.

    A row misses e = sum of W_j * mean_j over what it removed. In a round the removed weight that brings most
    of it back, relative to the variance of its input, returns; for it the least important kept weight leaves
    whose own part of the expected output has the other sign, so that it helps too. A row stops when |e| is
    small, when e changes its sign, or when a swap would make |e| larger, which is then not made.

    Args:
        weight: Shape [out, in], any float dtype.
        mask: Shape [out, in], bool, True = kept.
        mean: Mean of each input over tokens, shape [in].
        variance: Variance of each input over tokens, shape [in].
        norm: L2 norm of each input, shape [in]; with |W| it gives the importance.
        how: Rounds, the |e| that is small enough (in units of the output), and the exponent of the variance.
        pattern: (kept, of) of the mask, if it has one: swaps then stay inside groups.

    Returns:
        The new mask, with as many kept weights in every row (and group) as before.
    """
    dense = weight.detach().float()
    new = mask.clone()
    part = dense * mean
    # A dead input has no variance, but no mean either: it is worth 0 / tiny, nothing.
    value = part / variance.clamp_min(torch.finfo(torch.float32).tiny).pow(how.power)
    importance = dense.abs() * norm
    missing = part.masked_fill(mask, 0).sum(1)
    active = (missing.abs() >= how.threshold).nonzero()[:, 0]
    for _ in range(how.rounds):
        if not len(active):
            break
        # All rows that still miss something swap at once, one pair each.
        sign = missing[active].sign()[:, None]
        back, out, possible = _best_swap(
            sign * value[active],
            importance[active].masked_fill(sign * part[active] >= 0, torch.inf),
            new[active],
            pattern[1] if pattern else weight.shape[1],
        )
        active, back, out = active[possible], back[possible], out[possible]
        left = missing[active] - part[active, back] + part[active, out]
        better = left.abs() <= missing[active].abs()
        active, back, out, left = active[better], back[better], out[better], left[better]
        new[active, back], new[active, out] = True, False
        goes_on = (left.abs() >= how.threshold) & (left.sign() == missing[active].sign())
        missing[active] = left
        active = active[goes_on]
    return new


def _best_swap(value: Tensor, importance: Tensor, kept: Tensor, of: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each row which weight returns, which leaves for it, and whether there are such two.

    Args:
        value: What the return of each weight is worth, shape [rows, in]; only above zero helps.
        importance: What stays last, shape [rows, in]; infinite where a weight must not leave.
        kept: The mask now, shape [rows, in].
        of: How many consecutive inputs form a group that both must belong to.
    """
    lowest, leaves = importance.masked_fill(~kept, torch.inf).view(len(kept), -1, of).min(2)
    # Where nothing may leave a group, nothing can return to it.
    blocked = lowest.isinf().repeat_interleave(of, dim=1)
    best, returns = value.masked_fill(kept | blocked, 0).max(1)
    group = returns // of
    return returns, leaves.gather(1, group[:, None])[:, 0] + group * of, best > 0
