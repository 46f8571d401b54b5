"""GBLM: weigh each weight by its activations and by how strongly the loss depends on it.

Source: Das et al. 2023, https://arxiv.org/abs/2311.04902

The paper's 100 * sum over 128 samples of |gradient| depends on the number of samples, while the activations'
norm does not. Here the mean over samples stands for the sum: with 128 samples the balance is the paper's, and
with any other number it stays the same.
"""

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from structprune.calibration.statistics import Parts, Statistics
from structprune.pruners.weight._scored import ScorePruner

# alpha = 100 stands for a sum over so many samples.
PAPER_SAMPLES = 128


class Gblm(ScorePruner):
    """Score a weight by |W_ij| * (||X_j|| + alpha * gradient_ij), ranked inside each output row.

    Args:
        alpha: What the gradient counts beside the activations, in the paper's scale.
        gradient_norm: How the gradients of the samples are added up: their sizes ("l1") or squares ("l2").
        activations: Whether activations count beside the gradient; without them only the gradient does.
    """

    alpha: Annotated[float, Field(ge=0)] = 100.0
    gradient_norm: Literal["l1", "l2"] = "l1"
    activations: bool = True

    @property
    def needs(self) -> Parts:
        """Return the gradient, added up as asked, and the inputs' norms where activations count."""
        gradient: Parts = frozenset({"gradient_l1" if self.gradient_norm == "l1" else "gradient_l2"})
        return gradient | frozenset({"norm"} if self.activations else ())

    def score(self, weight: Tensor, seen: Statistics) -> Tensor:
        """Return |W| * (activations + gradient), shape [out, in], float32; a higher score is kept.

        Args:
            weight: Shape [out, in], in the model's dtype.
            seen: Norms of the input features, shape [in], and mean gradient sizes, shape [out, in].
        """
        size = weight.float().abs()
        if not self.activations:
            return size * seen.gradient
        # A sum of sizes grows with the samples, a root of summed squares with their root.
        samples = PAPER_SAMPLES if self.gradient_norm == "l1" else PAPER_SAMPLES**0.5
        # The paper divides the norm by sqrt(samples); multiplying here leaves alpha = 0 exactly Wanda.
        gradient = seen.gradient * (self.alpha * samples * math.sqrt(seen.samples))
        return size * (seen.norm + gradient)
