"""Unit table: how many units of a block stay, as somebody gives them."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from structprune.decide.unit_counts import UnitCosts, UnitCounts
from structprune.errors import UsageError, counted


def _read_sizes(value: object) -> object:
    """Check that these are sizes, in words that a union of types would not find."""
    listed = value if isinstance(value, list | tuple) else (value,)
    for size in listed:
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(
                f"found {size!r:.40}, expected how many stay of a block, a whole number from 1 on"
            )
    return value


Sizes = Annotated[int | tuple[int | None, ...] | None, BeforeValidator(_read_sizes)]

_WORDS = {"kv_groups": "key-value groups", "channels": "channels"}


class UnitTable(BaseModel):
    """Leave so many units of a block as a configuration would say of it.

    Args:
        name: "table".
        kv_groups: Key-value groups that stay: one number for every block that is not skipped, or one for each
            block of the model, null where it stays whole; without it all stay.
        channels: Channels of the feed-forward that stay, said the same way.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["table"] = "table"
    kv_groups: Sizes = None
    channels: Sizes = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.kv_groups is None and self.channels is None:
            raise ValueError("a table needs kv_groups, channels or both: how many stay of a block")
        return self

    @property
    def asked(self) -> str:
        """Return what was asked for, as people say it."""
        said = ((_WORDS[key], getattr(self, key)) for key in _WORDS)
        return ", ".join(
            f"{size} {word}" if isinstance(size, int) else f"{word} block by block"
            for word, size in said
            if size is not None
        )

    def counts(self, there: Sequence[UnitCounts], costs: Sequence[UnitCosts]) -> list[UnitCounts]:
        """Return how many units of each block stay.

        Args:
            there: What each block has.
            costs: Of one unit of each block, 0 of those that may not leave.

        Raises:
            UsageError: A block cannot have that size; names key, block and the legal range.
        """
        groups = _stay(
            "kv_groups",
            self.kv_groups,
            [(a.kv_groups, b.kv_group) for a, b in zip(there, costs, strict=True)],
        )
        channels = _stay(
            "channels", self.channels, [(a.channels, b.channel) for a, b in zip(there, costs, strict=True)]
        )
        stay = zip(groups, channels, there, strict=True)
        return [UnitCounts(count, width, one.heads) for count, width, one in stay]


def _stay(key: str, sizes: Sizes, blocks: Sequence[tuple[int, int]]) -> list[int]:
    """Return how many units of one kind stay of each block, which has so many of such a cost."""
    if sizes is None:
        return [there for there, _ in blocks]
    if not any(cost for _, cost in blocks):
        raise UsageError(
            f"budget.{key}: no block has {_WORDS[key]} that may leave",
            hint=f"leave {key} out; `skip` and `units` choose what may leave",
        )
    if isinstance(sizes, int):
        wanted = [sizes if cost else there for there, cost in blocks]
    elif len(sizes) == len(blocks):
        wanted = [there if size is None else size for size, (there, _) in zip(sizes, blocks, strict=True)]
    else:
        raise UsageError(
            f"budget.{key}: {counted(len(sizes), 'number')} for {counted(len(blocks), 'block')}",
            hint="give one number for all, or one for every block, null where it stays whole",
        )
    for index, (size, (there, cost)) in enumerate(zip(wanted, blocks, strict=True)):
        if not (1 if cost else there) <= size <= there:
            raise UsageError(
                f"budget.{key}: {size} {_WORDS[key]} cannot stay in block {index}, which has {there}",
                hint=f"1 to {there} can" if cost else f"none of them may leave there: say null or {there}",
            )
    return wanted
