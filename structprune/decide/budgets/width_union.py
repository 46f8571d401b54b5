"""The budgets of width that a recipe can name, and how it names them."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Tag

from structprune.decide.budgets.sigmoid import SigmoidBudget
from structprune.decide.budgets.unit_table import UnitTable

_Word = Literal["uniform", "global"]
_NAMED = ("sigmoid", "table")


def _read_budget(value: object) -> object:
    """Read a name alone as {"name": ...}, which then says what it lacks; refuse what is no budget."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", value)
    if name not in _NAMED and (name not in get_args(_Word) or isinstance(value, dict)):
        raise ValueError(
            f"found {value!r:.60}, expected uniform, global, sigmoid or "
            "{name: table, channels: ..., kv_groups: ...}"
        )
    return {"name": value} if isinstance(value, str) and value in _NAMED else value


def _kind(value: object) -> str:
    if isinstance(value, str):
        return "word"
    return str(value.get("name", "table") if isinstance(value, dict) else getattr(value, "name", "word"))


AnyWidthBudget: Any = Annotated[
    Annotated[
        Annotated[_Word, Tag("word")]
        | Annotated[SigmoidBudget, Tag("sigmoid")]
        | Annotated[UnitTable, Tag("table")],
        Discriminator(_kind),
    ],
    BeforeValidator(_read_budget),
]
"""A pydantic field type: "uniform", "global", "sigmoid" alone or with its fields, or a table of sizes."""
