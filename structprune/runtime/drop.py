"""One place where tokens are dropped, and what the engine asks of the method that chooses there."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from structprune.runtime.tower import FewerFeatures
from structprune.runtime.view import View


class Chooser(Protocol):
    """What the engine asks of a method."""

    @property
    def newlines(self) -> Literal["protect", "compete"]:
        """Return whether tokens that only end a line of an image may be dropped."""
        ...

    @property
    def tower_layers(self) -> tuple[float, ...]:
        """Return the layers of the vision tower that it looks at.

        An integer counts them, from the end where it is negative; a float is a share of the depth.
        """
        ...

    @classmethod
    def method(cls) -> str:
        """Return the method's name."""
        ...

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return which tokens of each image stay, bool [images, tokens]: as many as `keep` says, [images]."""
        ...

    def watch(self, seen: View) -> None:
        """Note what a later stage will ask for, in `seen.notes`."""
        ...

    def merge(self, seen: View, chosen: Tensor) -> Tensor | None:
        """Return what becomes of the tokens that stay, as weights of all that were there.

        Args:
            seen: What was chosen from.
            chosen: What was chosen, bool [images, tokens].

        Returns:
            Float32 [images, tokens, tokens]: row j holds how much of every token goes into token j,
            and counts only where j stays. None where tokens stay as they are.
        """
        ...


@dataclass(frozen=True)
class Drop:
    """One place where tokens are dropped.

    Attributes:
        block: Number of the block, counted from 0.
        within: Whether they go between its attention and its feed-forward; else before it.
        tokens: How many tokens of an image are left: an integer says how many, a float which share of those
            that the image had at first; a count and a power, that power of the share that the count is of
            them; None leaves it to who chooses.
        chooser: Who chooses.
        compact: Whether positions are counted anew.
        at_most: Whether `tokens` says how many are left at most, and who chooses says how many.
        images: What lets the vision tower compute fewer features; None where it computes all.
        watches: Whether who chooses only looks on here, and nothing is dropped.
        pooled: Whether images of a row share what they keep, so that none is held to its own number.
    """

    block: int
    within: bool
    tokens: Tensor | None
    chooser: Chooser
    compact: bool = False
    at_most: bool = False
    images: FewerFeatures | None = None
    watches: bool = False
    pooled: bool = False

    def keep(self, sizes: Tensor) -> Tensor:
        """Return how many tokens stay of images with so many at first, at least one each; shape [images]."""
        return sizes if self.tokens is None else left_of(self.tokens, sizes)


def left_of(tokens: Tensor, sizes: Tensor) -> Tensor:
    """Return how many tokens are left of images with so many at first, at least one each; shape [images].

    Args:
        tokens: What is left, as `Drop.tokens` says it.
        sizes: Shape [images].
    """
    tokens = tokens.to(sizes.device)
    if tokens.is_floating_point():
        share = tokens if tokens.ndim == 0 else (tokens[0] / sizes) ** tokens[1]
        # Half up, after a rounding that takes 0.29 * 100 for 29.
        wanted = torch.floor((sizes.double() * share).round(decimals=9) + 0.5).long()
    else:
        wanted = tokens.expand_as(sizes)
    return wanted.clamp(min=1).minimum(sizes)
