"""The budgets that a recipe can name, and how it names them."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from structprune.decide.budgets.owl import Owl
from structprune.decide.budgets.ramp import Ramp
from structprune.decide.budgets.table import Table
from structprune.decide.budgets.target_params import TargetParams
from structprune.decide.by_name import ByName

AnyBudget: Any = Annotated[
    Annotated[Owl | Ramp | Table | TargetParams, Field(discriminator="name")] | None,
    BeforeValidator(ByName("uniform")),
]
"""A pydantic field type: a budget, its name alone for its defaults, or "uniform" (None)."""
