"""Methods that drop visual tokens in several stages, placed by depth as in their papers.

A paper says before which of 32 blocks tokens go, and which shares are left from there on. A target moves all
of these at once: every share is raised to the same power, which is 1 where the target is the paper's own.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import floor, log
from typing import ClassVar

from structprune.errors import UsageError
from structprune.pruners.token._family import TokenPruner

# Papers say where tokens go in LLaVA-1.5-7B and LLaVA-NeXT-7B.
DEPTH = 32


class StagedTokens(TokenPruner):
    """A pruner with several stages.

    Attributes:
        paper_stages: Block before which tokens are dropped -> share that the paper leaves there.
        paper_depth: Of how many blocks.
    """

    paper_stages: ClassVar[Mapping[int, float]]
    paper_depth: ClassVar[int] = DEPTH

    def stages(self, blocks: int) -> dict[int, float]:
        """Return before which blocks tokens are dropped, and the power of the last share that is left there.

        Stages keep their order and, where there are blocks enough, one block for each; the first block reads
        the embeddings, so that what looks at attention begins behind it.

        Raises:
            UsageError: The model has one block only.
        """
        if blocks < 2:
            raise UsageError(
                f"{self.method()}: a model with one block leaves no block to save in",
                hint="choose a method that drops tokens at the embeddings, such as divprune",
            )
        last = log([*self.paper_stages.values()][-1])
        found: dict[int, float] = {}
        place = 0
        for block, share in self.paper_stages.items():
            if block:
                place = min(max(scaled(block, blocks, self.paper_depth), place + 1), blocks - 1)
            found[place] = log(share) / last
        return found

    def looked_at(self, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return how many tokens there are before each stage where some are dropped, added up.

        Args:
            size: Tokens of the image.
            counts: Of every block how many of them its attention and its feed-forward compute.
        """
        entering = [size, *(left for _, left in counts)]
        stages = self.stages(len(counts))
        return sum(entering[block] for block in stages if entering[block + 1] < entering[block])


def scaled(block: int, blocks: int, depth: int = DEPTH) -> int:
    """Return which of so many blocks is as deep as one of the paper's, the nearest, of two the later."""
    return floor(Fraction(block * blocks, depth) + Fraction(1, 2))
