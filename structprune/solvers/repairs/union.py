"""The repairs that a recipe can name, and how it names them."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from structprune.solvers.repairs.dsnot import Dsnot
from structprune.solvers.repairs.least_squares import LeastSquares
from structprune.solvers.repairs.obs import Obs


def _read_repair(value: object) -> object:
    """Read "obs" as {"name": "obs"} and "none" as no repair at all."""
    if value == "none":
        return None
    return {"name": value} if isinstance(value, str) else value


AnyRepair: Any = Annotated[
    Annotated[Obs | LeastSquares | Dsnot, Field(discriminator="name")] | None,
    BeforeValidator(_read_repair),
]
"""A pydantic field type: a repair, its name alone for its defaults, or "none" (None)."""
