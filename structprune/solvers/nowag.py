"""NoWag's normalisation: columns first, then rows, so that no input or output outweighs the others.

Source: Liu et al. 2025, NoWag, https://arxiv.org/abs/2504.14569
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# The paper's; it keeps an all-zero column or row from dividing by zero.
FLOOR = 1e-5


@dataclass(frozen=True)
class NormalisedWeight:
    """A weight divided by its column norms, then by its row norms.

    Attributes:
        weight: The normalised weight, shape [out, in], float32.
        columns: What the columns were divided by, shape [in], float32.
        rows: What the rows were divided by after that, shape [out], float32.
    """

    weight: Tensor
    columns: Tensor
    rows: Tensor

    def score(self, norm: Tensor) -> Tensor:
        """Return NoWag-P's score, the normalised weight squared times D, shape [out, in], float32.

        Args:
            norm: L2 norm of each input feature over all calibration tokens, shape [in].
        """
        return self.weight.square() * importance(norm)


def normalise_weight(weight: Tensor) -> NormalisedWeight:
    """Divide a weight by its column norms, then by the row norms of the result, in float32.

    Args:
        weight: Shape [out, in], any float dtype.
    """
    columns = weight.detach().float().norm(dim=0) + FLOOR
    scaled = weight.detach().float() / columns
    rows = scaled.norm(dim=1) + FLOOR
    # Columns first, as in the paper: the rows are measured on what that leaves, so the order shows.
    return NormalisedWeight(scaled / rows[:, None], columns, rows)


def importance(norm: Tensor) -> Tensor:
    """Return D, how much an error in each input counts, shape [in], float32, with mean 1.

    Inputs without a usable D (zero, or not finite) get the mean of the others, as in the paper: nothing
    was measured there, which is no reason to give them away.

    Args:
        norm: L2 norm of each input feature over all calibration tokens, shape [in].
    """
    # In float64, because the square of a float32 norm may overflow.
    squares = norm.detach().double().square()
    valid = squares.isfinite() & (squares > 0)
    if not valid.any():
        return torch.ones_like(squares, dtype=torch.float32)
    mean = squares[valid].mean()
    return torch.where(valid, squares / mean, 1.0).float()
