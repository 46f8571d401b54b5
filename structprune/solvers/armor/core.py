"""The sparse core between two fixed wrappers: which N of every M stay, and with which values.

Source: Liu et al. 2025, ARMOR, https://arxiv.org/abs/2510.05528 (the closed form over a group's supports)
With the wrappers fixed, each block of the core has a quadratic of its own: left Gram (x) right Gram. The
paper updates one group per block at a time, because the groups of a block interact. Here all groups are first
searched together by ADMM, as ALPS does for a whole matrix: the product of two small Gram matrices is solved
exactly through their eigenvectors. Then a sample of the groups moves at once, each exactly; the sample of a
block shrinks when it refuses and grows when it accepts. What the groups' interaction leaves undone is done by
conjugate gradients on the values. A block takes what it is offered only if its own loss falls. The gradient
is kept up to date incrementally.
"""

from dataclasses import dataclass, replace
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from structprune.decide.select import mask_groups
from structprune.errors import UsageError

# 4:8 has 70 supports; every one of them is tried for every group.
MOST_SUPPORTS = 128
# Towards the present value, so that a dead group or a dead output leaves a curvature to divide by.
RIDGE = 1e-6
# The share of a block's groups that move together: at first, and how it adapts to being accepted.
START_SHARE, LEAST_SHARE, MORE, LESS = 0.3, 0.002, 1.2, 0.6
# What pulls the two copies of ADMM together, first and last, where the quadratic's diagonal is 1. Much less,
# and the support does not settle; much more, and it hardly moves. Chosen by the loss reached on the matrix of
# scripts/bench/armor.py and on four of a smaller trained model.
PULL = 0.1, 0.6


def supports(pattern: tuple[int, int]) -> Tensor:
    """Return every choice of N positions among M, shape [choices, N].

    Raises:
        UsageError: There are too many to try them all.
    """
    kept, of = pattern
    if comb(of, kept) > MOST_SUPPORTS:
        raise UsageError(
            f"{kept}:{of} has {comb(of, kept)} supports per group, more than {MOST_SUPPORTS}",
            hint="choose a pattern such as 2:4 or 4:8",
        )
    return torch.tensor(list(combinations(range(of), kept)))


@dataclass
class Core:
    """Blocks of the core with their quadratic, ready to be improved in place.

    Args:
        values: The core's blocks, shape [rows, columns, out, in]: block row, block column, and inside.
        gradient: Half the gradient of the loss, same shape; kept up to date.
        left: left^T left of each block row, shape [rows, out, out].
        right: right H right^T of each block column, shape [columns, in, in].
        pattern: (N, M); M divides the blocks' inputs.
    """

    values: Tensor
    gradient: Tensor
    left: Tensor
    right: Tensor
    pattern: tuple[int, int]

    def search(self, steps: int, refits: int) -> Tensor:
        """Search the supports of all groups together by ADMM and refit the values on what it finds.

        Args:
            steps: Steps of ADMM; one costs four products of blocks.
            refits: Conjugate-gradient steps on the support that it ends with.

        Returns:
            Which blocks took what was found, shape [rows, columns], bool.
        """
        values = self._by_admm(steps)
        found = replace(self, values=values, gradient=self.gradient + self._bend(values - self.values))
        found.refit(values != 0, refits)
        falls = ((found.values - self.values) * (self.gradient + found.gradient)).sum((2, 3)) < 0
        taken = falls[:, :, None, None]
        self.values = torch.where(taken, found.values, self.values)
        self.gradient = torch.where(taken, found.gradient, self.gradient)
        return falls

    def _by_admm(self, steps: int) -> Tensor:
        """Return the sparse one of two copies of the values; the other is free to minimise the quadratic."""
        (left, by_row), (right, by_column) = scaled(self.left), scaled(self.right)
        scale = by_row[:, None, :, None] * by_column[None, :, None, :]
        (bends, turn), (curves, spin) = torch.linalg.eigh(left), torch.linalg.eigh(right)
        curvature = bends.clamp_min(0)[:, None, :, None] * curves.clamp_min(0)[None, :, None, :]
        turn, spin, unturn, unspin = turn[:, None], spin[None], turn.mT[:, None], spin.mT[None]
        sparse = self.values * scale
        # In the basis of the eigenvectors: the quadratic's own minimum, times its curvature.
        aim = curvature * (unturn @ sparse @ spin) - unturn @ (self.gradient / scale) @ spin
        apart, (pull, last) = torch.zeros_like(sparse), PULL
        growth = (last / pull) ** (1 / steps)
        for _ in range(steps):
            free = unturn @ (sparse - apart) @ spin
            free = turn @ free.mul_(pull).add_(aim).div_(curvature + pull) @ unspin
            free += apart
            sparse = free * mask_groups(free.abs().flatten(0, -2), *self.pattern).view(free.shape)
            apart = (free - sparse).div_(growth)
            pull *= growth
        return sparse / scale

    def move_groups(self, share: Tensor, generator: torch.Generator, sweeps: int) -> Tensor:
        """Choose supports and values of a sample of the groups at once, each exactly, the others held.

        Args:
            share: Shape [rows, columns], how large a part of its groups a block moves.
            generator: Draws the groups.
            sweeps: How often.

        Returns:
            The share for the next time.
        """
        rows, columns, out, inputs = self.values.shape
        of, own = self.pattern[1], diagonal(self.left)[:, None, :, None, None]
        by_group = (rows, columns, out, inputs // of, of)
        curvature = group_curvature(self.right, of)
        inverses = support_inverses(curvature, self.pattern).flatten(0, 1)
        for _ in range(sweeps):
            values = self.values.view(by_group)
            # The gradient that would be left if a group were zero: what its best values must answer.
            linear = self.gradient.view(by_group) / own - torch.einsum("rcoqx,cqxy->rcoqy", values, curvature)
            # One batched product per group of inputs: [columns * groups, rows * out, M].
            best = best_values(linear.permute(1, 3, 0, 2, 4).reshape(-1, rows * out, of), inverses)
            target = best.view(columns, inputs // of, rows, out, of).permute(2, 0, 3, 1, 4)
            drawn = torch.rand(by_group[:-1], generator=generator).to(share) < share[:, :, None, None]
            target = torch.where(drawn[..., None], target, values).reshape(self.values.shape)
            step = target - self.values
            bend = self._bend(step)
            falls = (step * (2 * self.gradient + bend)).sum((2, 3)) <= 0
            # Selected and not added: what stays stays bit for bit, and a zero is exactly zero.
            taken = falls[:, :, None, None]
            self.values = torch.where(taken, target, self.values)
            self.gradient = torch.where(taken, self.gradient + bend, self.gradient)
            share = torch.where(falls, (share * MORE).clamp_max(1.0), (share * LESS).clamp_min(LEAST_SHARE))
        return share

    def refit(self, mask: Tensor, steps: int) -> None:
        """Improve the values on a fixed support by conjugate gradients, which never raise the loss.

        Args:
            mask: The support, shape of the values.
            steps: How many steps; one costs two products of blocks.
        """
        scale = mask / (diagonal(self.left)[:, None, :, None] * diagonal(self.right)[None, :, None, :])
        direction, before = torch.zeros_like(self.values), None
        for _ in range(steps):
            ahead = -self.gradient * scale
            now = -(ahead * self.gradient).sum((2, 3), keepdim=True)
            direction = ahead if before is None else ahead + direction * (now / before)
            bend = self._bend(direction)
            # At the optimum both are zero: the tiny number turns 0 / 0 into a step of no length.
            tiny = torch.finfo(now.dtype).tiny
            length = now / (direction * bend).sum((2, 3), keepdim=True).clamp_min(tiny)
            self.values = self.values + length * direction
            self.gradient = self.gradient + length * bend
            before = now.clamp_min(tiny)

    def _bend(self, step: Tensor) -> Tensor:
        """Return how much a step changes the gradient."""
        return self.left[:, None] @ (step @ self.right[None])


def diagonal(gram: Tensor) -> Tensor:
    """Return the diagonals of Gram matrices [n, b, b], lifted off zero, shape [n, b]."""
    found = gram.diagonal(dim1=1, dim2=2)
    return found + RIDGE * found.mean() + torch.finfo(found.dtype).tiny


def scaled(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Scale Gram matrices [n, b, b] to a diagonal of ones; returns them and the scales, shape [n, b]."""
    scale = diagonal(gram).sqrt()
    return gram / scale[:, :, None] / scale[:, None, :], scale


def group_curvature(right: Tensor, of: int) -> Tensor:
    """Return the M x M blocks on the diagonals of [columns, in, in], shape [columns, in / M, M, M]."""
    columns, inputs, _ = right.shape
    split = right.view(columns, inputs // of, of, inputs // of, of)
    return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def support_inverses(curvature: Tensor, pattern: tuple[int, int]) -> Tensor:
    """Invert a group's curvature on every support, zero elsewhere: shape [..., choices, M, M]."""
    choices = supports(pattern).to(curvature.device)
    of = pattern[1]
    lift = RIDGE * curvature.diagonal(dim1=-2, dim2=-1).mean((-1, -2), keepdim=True) + 1e-30
    lifted = curvature + lift[..., None] * torch.eye(of, dtype=curvature.dtype, device=curvature.device)
    inverses = curvature.new_zeros(*curvature.shape[:-2], len(choices), of, of)
    for index, choice in enumerate(choices):
        inner = lifted[..., choice[:, None], choice]
        inverses[..., index, choice[:, None], choice] = torch.linalg.inv(inner)
    return inverses


def best_values(linear: Tensor, inverses: Tensor) -> Tensor:
    """Return each group's best values, of all supports the one that lowers the loss most.

    Args:
        linear: The gradient with the group at zero, shape [n, groups, M].
        inverses: Inverse curvatures by support, shape [n, choices, M, M].

    Returns:
        Shape [n, groups, M], zero off the support.
    """
    count, choices, of, _ = inverses.shape
    stacked = inverses.permute(0, 2, 1, 3).reshape(count, of, choices * of)
    answers = torch.bmm(linear, stacked).view(count, -1, choices, of)
    gains = (answers * linear[:, :, None]).sum(-1)
    best = gains.argmax(-1)
    return -answers.gather(2, best[..., None, None].expand(-1, -1, 1, of)).squeeze(2)
