"""Methods that rank visual tokens: a score for each, and the highest stay."""

from abc import abstractmethod
from typing import final

import torch
from torch import Tensor

from structprune.decide.answers import check_shape
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
        return highest(self.scored(seen), seen.real, keep)

    @final
    def scored(self, seen: View) -> Tensor:
        """Return what `score` gives, of which the scores of tokens are all numbers, shape [images, tokens].

        Raises:
            MethodError: It gives something else.
            QualityError: A score is not a number.
        """
        found = check_shape(self.score(seen), seen.real.shape, self.called("the visual tokens"))
        return finite(found, seen.real, self.method())


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
        hint="look whether the model computes NaN on this input, in this dtype, or the method itself does",
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


def highest_together(scores: Tensor, real: Tensor, keep: Tensor, row: Tensor) -> Tensor:
    """Return the tokens of the highest scores in all images of a row, of equal ones the first.

    Args:
        scores: Float32 [images, tokens].
        real: Which entries compete, bool [images, tokens].
        keep: How many of each image; those of one row share what they have together, shape [images].
        row: In which row each image is, shape [images].

    Returns:
        Bool, shape [images, tokens].
    """
    chosen = torch.zeros_like(real)
    for one in sorted({*row.tolist()}):
        mine = real & (row == one)[:, None]
        count = keep[mine.any(1)].sum()
        chosen[mine] = rank(scores[mine][None], mine[mine][None])[0] < count
    return chosen
