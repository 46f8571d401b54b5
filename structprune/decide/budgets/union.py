"""The budgets that a recipe can name, and how it names them."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from structprune.decide.budgets.owl import Owl
from structprune.decide.budgets.ramp import Ramp
from structprune.decide.budgets.table import Table
from structprune.decide.budgets.target_params import TargetParams


def _read_budget(value: object) -> object:
    """Read "owl" as {"name": "owl"} and "uniform" as no budget at all."""
    if value == "uniform":
        return None
    return {"name": value} if isinstance(value, str) else value


AnyBudget: Any = Annotated[
    Annotated[Owl | Ramp | Table | TargetParams, Field(discriminator="name")] | None,
    BeforeValidator(_read_budget),
]
"""A pydantic field type: a budget, its name alone for its defaults, or "uniform" (None)."""
