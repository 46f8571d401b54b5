"""Random: the baseline that every method must beat.

Source: Blalock et al. 2020, https://arxiv.org/abs/2003.03033 (random pruning as the baseline to report)
"""

import hashlib
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from structprune.calibration.statistics import Statistics
from structprune.pruners.weight._scored import ScorePruner


class Random(ScorePruner):
    """Score weights by chance, ranked inside each output row.

    Args:
        seed: Draws the scores; a recipe's seed unless given.
    """

    needs_data: ClassVar[bool] = False

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def score(self, weight: Tensor, seen: Statistics) -> Tensor:
        """Return scores drawn from the seed and the weight's own bytes, shape [out, in], float32.

        The bytes make every matrix draw its own scores, whatever the order in which matrices are visited.

        Args:
            weight: Shape [out, in], in the model's dtype.
            seen: Nothing; the method needs no data.
        """
        content = weight.detach().cpu().contiguous().view(torch.uint8).numpy().data
        digest = hashlib.sha256(content).digest()
        draw = int.from_bytes(digest[:4], "little") ^ self.seed
        # Drawn on the CPU, so that every device gets the same ones.
        return torch.rand(weight.shape, generator=torch.Generator().manual_seed(draw)).to(weight.device)
