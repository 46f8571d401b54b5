"""FitPrune's fit: as few tokens deleted per block as keep the attention that tokens receive, for a budget.

Source: Ye et al. 2025, https://arxiv.org/abs/2409.10197
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from structprune.errors import QualityError, UsageError
from structprune.runtime.view import View

# Width of the interval of alpha at which the bisection ends: seven rounds from [0, 1].
WIDTH = 0.01


def deletable(scores: Tensor, total: float, alpha: float) -> Tensor:
    """Return which tokens can go while the rest keep their share of the attention received.

    Args:
        scores: Attention that each token receives, shape [tokens].
        total: What all tokens of the unpruned model receive here.
        alpha: The share of it that may be lost.

    Returns:
        Bool, shape [tokens]: the longest run of the least, less one for safety.
    """
    order = scores.argsort(dim=0, stable=True)
    left = scores.sum() - scores[order].cumsum(0)
    count = int((left >= (1 - alpha) * total).sum())
    found = torch.zeros_like(scores, dtype=torch.bool)
    found[order[: max(count - 1, 0)]] = True
    return found


@dataclass
class Walked:
    """One image on its way through the blocks.

    Attributes:
        size: Its tokens.
        own: Attention received from the image's own tokens, of every unpruned block.
        text: The same from the text after it.
        deleted: Tokens deleted in each block of the present walk.
        spent: What the blocks walked so far cost.
        needed: What all blocks cost if nothing more is deleted.
        left: Tokens that are left.
        done: Whether nothing more is deleted.
    """

    size: int
    own: list[float] = field(default_factory=list)
    text: list[float] = field(default_factory=list)
    deleted: list[int] = field(default_factory=list)
    spent: float = 0.0
    needed: float = 0.0
    left: int = 0
    done: bool = False


class Fit:
    """Chooses while it is fitted: first it notes what tokens receive, then it deletes by alpha.

    Args:
        blocks: How many there are.
        operations: What a block costs, from tokens entering and leaving.
        demand: How much of what is allowed an image needs; 1 is all of it.
        newlines: Whether tokens that only end a line may go.
    """

    def __init__(
        self,
        blocks: int,
        operations: Callable[[int, int], float],
        demand: Callable[[Walked], float],
        *,
        newlines: Literal["protect", "compete"],
    ) -> None:
        self._blocks, self._operations, self._demand = blocks, operations, demand
        self.newlines = newlines
        self.images: list[Walked] = []
        self._batch: list[Walked] = []
        self._block = 0
        self._next = 0
        self.alpha: float | None = None

    @classmethod
    def method(cls) -> str:
        """Return the method's name."""
        return "fitprune"

    def begin(self, alpha: float | None) -> None:
        """Begin a walk over all images; without alpha nothing is deleted."""
        self.alpha, self._next = alpha, 0
        for image in self.images:
            image.deleted, image.spent, image.done = [], 0.0, False

    def begin_batch(self) -> None:
        """Begin the next batch of the walk."""
        self._block, self._batch = 0, []

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return what stays in the block that runs now, bool [images, tokens].

        Raises:
            QualityError: Attention is not finite.
        """
        if self._block == 0:
            sizes = seen.sizes.tolist()
            if self.alpha is None:
                self.images += [Walked(size) for size in sizes]
            self._batch = self.images[self._next : self._next + len(sizes)]
            self._next += len(sizes)
        chosen = seen.real.clone()
        if not all(bool(one.isfinite().all()) for one in seen.received):
            raise QualityError(
                f"{self.method()}: the attention that a visual token receives is not finite",
                hint="look whether the model computes NaN on the calibration images, in this dtype",
            )
        for number, (own, text) in enumerate(zip(*seen.received, strict=True)):
            image, left = self._batch[number], int(seen.left[number])
            if self.alpha is None:
                image.own.append(float(own.sum()))
                image.text.append(float(text.sum()))
                continue
            gone = torch.zeros(left, dtype=torch.bool, device=own.device)
            if not image.done:
                gone = deletable(own[:left], image.own[self._block], self.alpha)
                gone &= deletable(text[:left], image.text[self._block], self.alpha)
            chosen[number, :left] = ~gone
            self._note(image, left + int(seen.protected[number]), int(gone.sum()))
        self._block += 1
        return chosen

    def _note(self, image: Walked, left: int, gone: int) -> None:
        image.deleted.append(gone)
        image.spent += self._operations(left, left - gone)
        image.left = left - gone
        rest = (self._blocks - len(image.deleted)) * self._operations(image.left, image.left)
        image.needed = image.spent + rest
        image.done = image.done or self._demand(image) <= 1

    @property
    def needs(self) -> float:
        """Return how much of what is allowed the images need in the present walk, as a mean; 1: all of it."""
        return fmean(map(self._demand, self.images))

    def shares(self) -> list[float]:
        """Return which share of an image's tokens leaves each block, from the deletions of the present walk.

        Images of one size delete whole tokens: the mean of all deletions so far, rounded down. Rounded block
        by block, as in the paper, every block that deletes would keep up to one token too many.
        """
        sizes = {image.size for image in self.images}
        found, left = [], 1.0
        for block in range(self._blocks):
            if len(sizes) == 1:
                size = next(iter(sizes))
                gone = sum(sum(image.deleted[: block + 1]) for image in self.images) // len(self.images)
                left = (size - gone) / size
            else:
                left -= fmean(image.deleted[block] / image.size for image in self.images)
            found.append(left)
        return found


def fit_shares(fit: Fit, walk: Callable[[], None], told: Callable[[int], None]) -> list[float]:
    """Return which share of an image's tokens leaves each block, for the least alpha that the budget allows.

    Args:
        fit: Its images are measured already.
        walk: Runs all calibration batches.
        told: Told the number of walks that are done.

    Raises:
        UsageError: No alpha is enough; says how much must be allowed.
    """
    low, high, walks = 0.0, 1.0, 0
    best: Sequence[float] | None = None
    while high - low > WIDTH or best is None:
        middle = (low + high) / 2 if high - low > WIDTH else high
        fit.begin(middle)
        walk()
        walks += 1
        told(walks)
        if fit.needs <= 1:
            best, high = fit.shares(), middle
        elif middle == high:
            raise UsageError(
                f"target: images need {fit.needs:.4g} times as much when all tokens go that can go",
                hint=f"ask for {fit.needs:.4g} times as much or more",
            )
        else:
            low = middle
    return list(best)
