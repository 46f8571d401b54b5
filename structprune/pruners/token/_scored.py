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
        return highest(finite(self.score(seen), seen.real, self.method()), seen.real, keep)


def finite(values: Tensor, real: Tensor, method: str) -> Tensor:
    """Return the same values, of which those of tokens are all numbers.

    Args:
        values: Shape [images, tokens] or [images, tokens, features].
        real: Which entries are tokens, bool [images, tokens].
        method: Whose values they are.

    Raises:
        QualityError: One is not.
    """
    if bool(values[real].isfinite().all()):
        return values
    what = "a score" if values.ndim == 2 else "a feature"
    raise QualityError(
        f"{method}: {what} of a visual token is not finite",
        hint="look whether the model computes NaN on this input, in this dtype",
    )


def rank(scores: Tensor, real: Tensor) -> Tensor:
    """Return how many tokens of its image come before each one: those of higher scores, or equal and earlier.

    Args:
        scores: Float32 [images, tokens].
        real: Which entries compete, bool [images, tokens]; the others come last.
    """
    order = scores.masked_fill(~real, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)


def highest(scores: Tensor, real: Tensor, keep: Tensor) -> Tensor:
    """Return the tokens of the highest scores, of equal ones the first; bool [images, tokens].

    Args:
        scores: Float32 [images, tokens].
        real: Which entries compete, bool [images, tokens].
        keep: How many of each image, shape [images].
    """
    return (rank(scores, real) < keep[:, None]) & real
