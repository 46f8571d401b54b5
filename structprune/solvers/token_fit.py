"""FitPrune's fit: as few tokens deleted per block as keep the attention that tokens receive, for a budget.

Source: Ye et al. 2025, https://arxiv.org/abs/2409.10197
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from structprune.calibration.notebook import Look
from structprune.errors import InputError, QualityError, UsageError
from structprune.models.streamed import Batch
from structprune.runtime.view import View

# Width of the interval of alpha at which the bisection ends, and how many rounds from [0, 1] that takes.
WIDTH = 0.01
ROUNDS = 7


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
        self.tower_layers: tuple[float, ...] = ()
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

    def watch(self, seen: View) -> None:
        """Note nothing: what is looked at decides at once."""

    def merge(self, seen: View, chosen: Tensor) -> None:
        """Return nothing: tokens are deleted as they are."""

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

    def noted(self) -> dict[str, Tensor]:
        """Return what the last batch showed, for `repeat`."""
        if self.alpha is not None:
            return {"deleted": torch.tensor([image.deleted for image in self._batch], dtype=torch.int64)}
        return {
            "size": torch.tensor([image.size for image in self._batch], dtype=torch.int64),
            "own": torch.tensor([image.own for image in self._batch], dtype=torch.float64),
            "text": torch.tensor([image.text for image in self._batch], dtype=torch.float64),
        }

    def repeat(self, noted: Mapping[str, Tensor]) -> None:
        """Go on as if the next batch had been run, from what `noted` returned after it."""
        lists = {name: values.tolist() for name, values in noted.items()}
        if self.alpha is None:
            found = zip(lists["size"], lists["own"], lists["text"], strict=True)
            self.images += [Walked(*each) for each in found]
            self._next = len(self.images)
            return
        for deleted in lists["deleted"]:
            image = self.images[self._next]
            self._next += 1
            left = image.size
            for gone in deleted:
                self._note(image, left, gone)
                left -= gone

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


class Walks:
    """Walks over all batches, one after another; a batch of which there is a note is not run again.

    Args:
        fit: Chooses in every block while a batch runs.
        batches: Calibration data.
        run: Runs one of them.
        look: Its notes are numbered walk by walk, batch by batch.
    """

    def __init__(self, fit: Fit, batches: Sequence[Batch], run: Callable[[Batch], None], look: Look) -> None:
        self._fit, self._batches, self._run, self._look = fit, batches, run, look
        self._done = 0

    def __call__(self) -> None:
        """Walk once."""
        # Of these walks one measures; where the interval ends at 1, one more is needed.
        total = max((ROUNDS + 1) * len(self._batches), self._done + len(self._batches))
        for batch in self._batches:
            self._look.told(self._done, total)
            if self._look.notes.has(self._done):
                self._fit.repeat(self._look.notes.read(self._done))
            else:
                self._fit.begin_batch()
                self._run(batch)
                self._look.notes.write(self._done, self._fit.noted())
            self._done += 1
        self._look.told(self._done, total)


def fit_shares(fit: Fit, walk: Callable[[], None]) -> list[float]:
    """Return which share of an image's tokens leaves each block, for the least alpha that the budget allows.

    Args:
        fit: Its images are measured already.
        walk: Runs all calibration batches.

    Raises:
        InputError: The calibration data hold no images.
        UsageError: No alpha is enough; says how much must be allowed.
    """
    if not fit.images:
        raise InputError(
            f"{fit.method()}: the calibration data hold no images",
            hint="--calibration FILE.jsonl with rows of image and question",
        )
    low, high = 0.0, 1.0
    best: Sequence[float] | None = None
    while high - low > WIDTH or best is None:
        middle = (low + high) / 2 if high - low > WIDTH else high
        fit.begin(middle)
        walk()
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
