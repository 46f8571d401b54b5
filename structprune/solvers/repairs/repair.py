"""What every repair is: it is told of a pruned matrix and makes up for what left."""

from abc import ABC, abstractmethod
from typing import ClassVar, final

from pydantic import BaseModel, ConfigDict

from structprune.calibration.statistics import Parts
from structprune.solvers.effort import Effort
from structprune.solvers.matrix import MatrixToPrune, PrunedMatrix


class Repair(BaseModel, ABC):
    """Makes up for removed weights: by new values, or by a better choice; as many leave as before.

    Attributes:
        parts: What it reads of a matrix's statistics.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: ClassVar[Parts]

    @abstractmethod
    def effort(self, rows: int, inputs: int) -> Effort:
        """Return what it takes on matrices that read the same input.

        Args:
            rows: Their outputs together.
            inputs: How many they read.
        """

    @final
    def repair(self, matrix: MatrixToPrune, pruned: PrunedMatrix) -> PrunedMatrix:
        """Return a pruned matrix after something was done about what it lost.

        Args:
            matrix: What it was.
            pruned: Its mask, and new values where there are some already.

        Raises:
            QualityError: The statistics or the weights hold what is not finite, or a system is singular.
        """
        # Where nothing left nothing is missing, and every bit stays as it was.
        return pruned if bool(pruned.mask.all()) else self._repair(matrix, pruned)

    @abstractmethod
    def _repair(self, matrix: MatrixToPrune, pruned: PrunedMatrix) -> PrunedMatrix: ...
