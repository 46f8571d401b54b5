"""Expert drop (REAP): remove the experts of a mixture that add least to what their tokens become.

Source: Lasby et al. 2025, https://arxiv.org/abs/2510.13999

The score is the mean over the tokens that were routed to an expert, so that a specialist that few tokens
reach is not weighed by how few they are; `frequency` weighs by nothing else.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from structprune.calibration.statistics import NOTHING, Parts, Statistics
from structprune.pruners.structure._experts import ExpertPruner


class ExpertDrop(ExpertPruner):
    """Score an expert by the mean of its router weight times the norm of its output.

    Args:
        score: "reap"; "frequency", the share of tokens that are routed to an expert; "random".
        seed: Draws the random score; a recipe's seed unless given.
    """

    score: Literal["reap", "frequency", "random"] = "reap"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @property
    def parts(self) -> Parts:
        """Return what the score reads of a mixture."""
        return NOTHING if self.score == "random" else frozenset({"routing"})

    def score_experts(self, index: int, experts: int, seen: Statistics) -> Tensor:
        """Return mean g_j(x) ||f_j(x)||_2 over the tokens x of each expert j, shape [experts], float32.

        An expert that no token reached has 0, and leaves first.

        Args:
            index: The block's.
            experts: How many it has.
            seen: Tokens and summed contributions of each expert, shape [experts].
        """
        if self.score == "random":
            # Apart for every block, and the same whichever blocks are visited.
            generator = torch.Generator().manual_seed(self.seed << 16 | index)
            return torch.rand(experts, generator=generator)
        routing = seen.routing
        if self.score == "frequency":
            return (routing.tokens / routing.tokens.sum()).float()
        return (routing.contributions / routing.tokens.clamp_min(1)).float()
