"""The budgets of width that a recipe can name, and how it names them."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Tag

from structprune.decide.budgets.sigmoid import SigmoidBudget
from structprune.decide.budgets.unit_table import UnitTable


def _read_budget(value: object) -> object:
    """Read a name alone as {"name": ...}; a table then says what it lacks."""
    return {"name": value} if value in ("sigmoid", "table") else value


def _kind(value: object) -> str:
    if isinstance(value, str):
        return "word"
    return str(value.get("name", "table") if isinstance(value, dict) else getattr(value, "name", "word"))


AnyWidthBudget: Any = Annotated[
    Annotated[
        Annotated[Literal["uniform", "global"], Tag("word")]
        | Annotated[SigmoidBudget, Tag("sigmoid")]
        | Annotated[UnitTable, Tag("table")],
        Discriminator(_kind),
    ],
    BeforeValidator(_read_budget),
]
"""A pydantic field type: "uniform", "global", "sigmoid" alone or with its fields, or a table of sizes."""
