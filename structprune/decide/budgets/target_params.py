"""Target parameters: what is to be left is given as a number of parameters of the whole model."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from structprune.decide.budgets.budget import Budget
from structprune.errors import UsageError


class TargetParams(Budget):
    """Remove so much that a number of parameters is left in the whole model, everything unpruned included.

    Args:
        name: "target_params".
        parameters: How many parameters of the model may stay different from zero.
    """

    name: Literal["target_params"] = "target_params"
    parameters: Annotated[int, Field(gt=0)]

    def asked(self, sparsity: float | str) -> float | str:
        """Return how many parameters were to be left; the sparsity follows from it."""
        return f"{self.parameters} parameters"

    def total(self, prunable: int, sparsity: float | str, model: nn.Module) -> int:
        """Return how many of the `prunable` weights leave; the sparsity does not count.

        Raises:
            UsageError: They are too few, or the model is smaller already.
        """
        whole = sum(parameter.numel() for parameter in model.parameters())
        if not whole - prunable < self.parameters <= whole:
            raise UsageError(
                f"budget.parameters: {self.parameters} of {whole} parameters cannot be left",
                hint=f"between {whole - prunable + 1} and {whole}: only the chosen linears are pruned",
            )
        return whole - self.parameters

    def shares(self, asked: Fraction, measured: Sequence[Tensor]) -> list[Fraction]:
        """Return the same share for every block."""
        return [asked] * len(measured)
