"""What an image costs with fewer tokens, in all the units that people ask in; and what choosing costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from structprune.plan.promise import Computed, Promises
from structprune.runtime.flops import (
    BlockCost,
    image_tokens,
    tower_counts,
    tower_operations,
    visual_operations,
)

# Of every block: a token that half of the blocks compute counts half.
UNIT = "visual tokens in the blocks"
# Of a model whose images differ in size, what one of so many tokens costs is told.
TYPICAL_SIZE = 1024
COUNTED = "visual tokens in the blocks of the language model, multiply and add as one; "
WITH_TOWER = "for image_flops in the vision tower and the projector too; "
CHOOSING = "selection_flops: what choosing costs"
VARYING = f"; of an image of {TYPICAL_SIZE} tokens, for their number depends on the image"


@dataclass(frozen=True)
class Account:
    """What is computed of an image.

    Attributes:
        config: The model's.
        size: Tokens of the image.
        counts: Of every block how many its attention and its feed-forward compute.
        seen: Of every layer of the vision tower the patches that its attention and its feed-forward compute;
            read where every image has as many.
        choosing: Operations that choosing costs.
    """

    config: PreTrainedConfig
    size: int
    counts: Sequence[tuple[int, int]]
    seen: Sequence[tuple[int, int]]
    choosing: int

    @property
    def pairs(self) -> int:
        """Return how many pairs of a visual token and a block there are."""
        return self.size * len(self.counts)

    @property
    def gone(self) -> int:
        """Return how many of them are not computed."""
        return self.pairs - sum(leaving for _, leaving in self.counts)

    def promises(self, blocks: Sequence[str], asked: str, *, at_most: bool) -> Promises:
        """Return what the plan promises.

        Args:
            blocks: Their paths in the model.
            asked: What was asked for.
            at_most: Whether the image decides how much of it is left.
        """
        said = tuple(
            Computed(block=path, attention=entering, feed_forward=leaving, of=self.size, at_most=at_most)
            for path, (entering, leaving) in zip(blocks, self.counts, strict=True)
        )
        return Promises(unit=UNIT, asked=asked, removed=self.gone, of=self.pairs, stored=said)

    @property
    def full(self) -> int:
        """Return what all its tokens cost in the blocks."""
        return visual_operations(BlockCost.of(self.config), [(self.size, self.size)] * len(self.counts))

    @property
    def run(self) -> int:
        """Return what they cost as they are run."""
        return visual_operations(BlockCost.of(self.config), self.counts)

    @property
    def towers(self) -> tuple[int, int] | None:
        """Return what tower and projector cost as they are run, and of the whole image.

        None where that depends on the image: a method that spares the tower takes no such model.
        """
        if image_tokens(self.config) is None:
            return None
        whole = tower_counts(self.config, self.size)
        return tower_operations(self.config, self.seen), tower_operations(self.config, whole)

    def facts(self) -> dict[str, Any]:
        """Return what is left."""
        left, full, run, towers = self.counts[-1][1], self.full, self.run, self.towers
        return {
            "visual_tokens": self.size,
            "keep_ratio": left / self.size,
            "tokens": left,
            "avg_tokens": sum(entering for entering, _ in self.counts) / len(self.counts),
            "visual_flops": run / full,
            **({"image_flops": (towers[0] + run) / (towers[1] + full)} if towers else {}),
            "selection_flops": self.choosing / full,
            "counted": COUNTED + (WITH_TOWER + CHOOSING if towers else CHOOSING + VARYING),
        }

    def notes(self, method: str) -> tuple[str, ...]:
        """Return what to say where choosing costs more than it saves; nothing is changed by it."""
        tower, whole = self.towers or (0, 0)
        return too_dear(method, self.choosing, self.full - self.run + whole - tower)


def too_dear(method: str, spent: int, saved: int) -> tuple[str, ...]:
    """Return a sentence where at most so much is spent on choosing and saved by it, if that is a loss."""
    if spent <= saved:
        return ()
    said = f"costs up to {spent:.3g} operations, more than the {saved:.3g} that it saves"
    return (f"{method}: to choose tokens of an image {said}: keep fewer, or drop them earlier",)
