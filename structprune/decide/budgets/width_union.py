"""The budgets of width that a recipe can name, and how it names them."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Tag

from structprune.decide.budgets.unit_table import UnitTable


def _read_budget(value: object) -> object:
    """Read "table" as {"name": "table"}, which then says what it lacks; refuse what is no budget."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", value)
    if name not in ("table", *(() if isinstance(value, dict) else ("uniform", "global"))):
        raise ValueError(
            f"found {value!r:.60}, expected uniform, global or {{name: table, channels: ..., kv_groups: ...}}"
        )
    return {"name": value} if value == "table" else value


def _kind(value: object) -> str:
    if isinstance(value, str):
        return "word"
    return str(value.get("name", "table") if isinstance(value, dict) else getattr(value, "name", "word"))


AnyWidthBudget: Any = Annotated[
    Annotated[
        Annotated[Literal["uniform", "global"], Tag("word")] | Annotated[UnitTable, Tag("table")],
        Discriminator(_kind),
    ],
    BeforeValidator(_read_budget),
]
"""A pydantic field type: "uniform", "global", or a table of sizes with its fields."""
