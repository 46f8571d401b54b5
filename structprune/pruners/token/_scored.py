"""Methods that rank visual tokens: a score for each, and the highest stay."""

from abc import abstractmethod

import torch
from torch import Tensor

from structprune.errors import QualityError
from structprune.pruners.token._family import TokenPruner
from structprune.runtime.view import View


class ScoredTokens(TokenPruner):
    """A pruner that keeps the tokens of the highest score."""

    @abstractmethod
    def score(self, seen: View) -> Tensor:
        """Return a score for every token, float32 [images, tokens]; higher is kept."""

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return the tokens of the highest scores; of equal ones the first.

        Raises:
            QualityError: A score is not a number.
        """
        return (self.ranks(seen) < keep[:, None]) & seen.real

    def ranks(self, seen: View) -> Tensor:
        """Return how many tokens of its image rank before each, by score, then by place; [images, tokens].

        Raises:
            QualityError: A score is not a number.
        """
        scores = self.score(seen)
        if not bool(scores[seen.real].isfinite().all()):
            raise QualityError(
                f"{self.method()}: a score of a visual token is not finite",
                hint="look whether the model computes NaN on this input, in this dtype",
            )
        scores = scores.masked_fill(~seen.real, -torch.inf)
        order = scores.argsort(dim=1, descending=True, stable=True)
        places = torch.arange(order.shape[1]).expand_as(order).to(order)
        return torch.empty_like(order).scatter(1, order, places)
