"""What calibration has seen of a block when it is measured or solved."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from structprune.calibration.collect import BlockSums
from structprune.calibration.statistics import Statistics
from structprune.models.arch import Linear

# Of a block that nothing was measured of.
UNMEASURED = torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class Seen:
    """What calibration knows of a block when it is solved.

    Attributes:
        sums: Of the inputs of the block's targets; empty where nobody reads data.
        gradients: What `reduce_gradients` returned, by name; empty where nobody reads gradients.
        samples: Calibration sequences.
        states: What `watching` returned, the rows of all batches; None where nothing is watched.
    """

    sums: BlockSums = field(default_factory=BlockSums)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    samples: int = 0
    states: Tensor | None = None

    def of(self, linear: Linear) -> Statistics:
        """Return what is known of one linear."""
        gradient = self.gradients.get(linear.label)
        here = None if gradient is None else gradient.to(linear.weight.device)
        return Statistics(self.sums.inputs.get(linear.label), here, self.samples, self.sums.routing)
