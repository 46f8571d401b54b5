"""What makes up for removed columns of a matrix: the mean of what they added, or a refit of those that stay.

Source: An et al. 2023, FLAP, https://arxiv.org/abs/2312.11983 (bias); the refit is ordinary least squares.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor

from structprune.calibration.statistics import Parts, Statistics
from structprune.decide.by_name import ByName
from structprune.errors import QualityError
from structprune.solvers.effort import VALUE_BYTES, Effort
from structprune.solvers.hessian import DAMPING, Damping, damp_hessian, read_weight


@dataclass(frozen=True)
class Repaired:
    """What a repair gives a matrix of which only some columns stay.

    Attributes:
        weight: New values of those columns, shape [out, kept], float32; None where they stay as they are.
        bias: To be added to every output, shape [out], float32; None for nothing.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None


class ColumnRepair(BaseModel, ABC):
    """Makes up for the columns that leave a matrix.

    Attributes:
        parts: What it reads of the matrix's statistics.
        adds_bias: Whether the matrix needs a bias afterwards.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: ClassVar[Parts]
    adds_bias: ClassVar[bool] = False

    @abstractmethod
    def effort(self, rows: int, inputs: int) -> Effort:
        """Return what it takes on a matrix [rows, inputs] of which few columns leave."""

    @abstractmethod
    def repair(self, weight: Tensor, kept: Tensor, seen: Statistics) -> Repaired:
        """Return what makes up for the columns that are not kept.

        Args:
            weight: Shape [out, in], any float dtype.
            kept: Indices of the columns that stay, ascending, shape [kept].
            seen: Of the matrix's input.

        Raises:
            QualityError: The statistics hold what is not finite, or a system is singular.
        """


class BiasRepair(ColumnRepair):
    """Put the mean of what left into the bias: removed inputs count as if they had their mean.

    Args:
        name: "bias".
    """

    name: Literal["bias"] = "bias"

    parts: ClassVar[Parts] = frozenset({"moments"})
    adds_bias: ClassVar[bool] = True

    def effort(self, rows: int, inputs: int) -> Effort:
        """Return what a product with the mean takes."""
        return Effort(products=2 * rows * inputs, told_bytes=VALUE_BYTES * rows)

    def repair(self, weight: Tensor, kept: Tensor, seen: Statistics) -> Repaired:
        """Return W (m * removed), shape [out], as a bias."""
        mean = seen.mean.clone()
        mean[kept] = 0
        return Repaired(bias=weight.float() @ mean)


class RefitRepair(ColumnRepair):
    """Refit the columns that stay to what the whole matrix computed; one Cholesky serves all rows.

    Args:
        name: "least_squares".
        damping: Added to the diagonal of the Gram matrix, relative to its mean.
    """

    name: Literal["least_squares"] = "least_squares"
    damping: Damping = DAMPING

    parts: ClassVar[Parts] = frozenset({"gram"})

    def effort(self, rows: int, inputs: int) -> Effort:
        """Return what a Cholesky factor takes, what is missing, and two triangles for every row."""
        return Effort(inputs**3 / 3 + 4 * rows * inputs**2, told_bytes=VALUE_BYTES * rows * inputs)

    def repair(self, weight: Tensor, kept: Tensor, seen: Statistics) -> Repaired:
        """Return W_K + W_R H_RK H_KK^-1: a ridge towards the weights as they were, not towards zero."""
        hessian = damp_hessian(seen.gram, self.damping).hessian
        dense = read_weight(weight)
        left = dense.clone()
        left[:, kept] = 0
        pull = (left @ hessian)[:, kept]
        for precision in (torch.float32, torch.float64):
            lower, failed = torch.linalg.cholesky_ex(hessian[kept][:, kept].to(precision))
            if not bool(failed):
                change = torch.cholesky_solve(pull.T.to(precision), lower).T.float()
                return Repaired(weight=dense[:, kept] + change)
        raise QualityError(
            f"the refit of {len(kept)} columns met a singular system, also in float64",
            hint="raise the damping, or use more calibration tokens",
        )


AnyColumnRepair: Any = Annotated[
    Annotated[BiasRepair | RefitRepair, Field(discriminator="name")] | None,
    BeforeValidator(ByName("none")),
]
"""A pydantic field type: a repair, its name alone for its defaults, or "none" (None)."""
