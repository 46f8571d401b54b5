"""The repairs that a recipe can name, and how it names them."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from structprune.decide.by_name import ByName
from structprune.solvers.repairs.dsnot import Dsnot
from structprune.solvers.repairs.least_squares import LeastSquares
from structprune.solvers.repairs.obs import Obs

AnyRepair: Any = Annotated[
    Annotated[Obs | LeastSquares | Dsnot, Field(discriminator="name")] | None,
    BeforeValidator(ByName("none")),
]
"""A pydantic field type: a repair, its name alone for its defaults, or "none" (None)."""
