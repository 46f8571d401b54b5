"""Which linears of a model are to be pruned: fields that every pruner of matrices has."""

import re
from collections.abc import Sequence
from typing import Annotated, final

from pydantic import BaseModel, BeforeValidator, Field

from structprune.errors import UsageError
from structprune.models.arch import Linear

# Five digits: no model has more blocks, and int() refuses a text of more than 4300.
_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)


def _block_ranges(value: object) -> object:
    """Read "0-3,28" or [0, "2-3"] as block ranges; every part becomes text."""
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, int) and not isinstance(parts, bool):
        parts = [parts]
    if not isinstance(parts, list | tuple):
        return value
    texts = [str(part).strip() for part in parts]
    for text in texts:
        match = _RANGE.fullmatch(text)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"block range {text!r}: write a block number or a range such as '0-3'")
    return tuple(texts)


def _ends(text: str) -> tuple[int, int]:
    """Return the first and the last block of a range."""
    match = _RANGE.fullmatch(text)
    assert match is not None
    return int(match[1]), int(match[2] or match[1])


def _patterns(value: object) -> object:
    """Read one pattern or several; each must be a regular expression."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return value
    for part in parts:
        try:
            re.compile(part)
        except (re.error, TypeError) as error:
            raise ValueError(f"pattern {part!r}: {error}") from None
    return tuple(parts)


Blocks = Annotated[tuple[str, ...], BeforeValidator(_block_ranges)]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_patterns)]


def split_words(value: object) -> object:
    """Read "attention,mlp" as a list, and an empty key as an empty one; leave what is neither as it is."""
    if value is None:
        return ()
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def block_numbers(ranges: Blocks) -> set[int]:
    """Return the blocks that numbers and ranges name."""
    return {index for first, last in map(_ends, ranges) for index in range(first, last + 1)}


def check_blocks(field: str, ranges: Blocks, count: int) -> None:
    """Check that a model of `count` blocks has every block that a field names.

    Raises:
        UsageError: It has not.
    """
    for first, last in map(_ends, ranges):
        if last >= count:
            raise UsageError(
                f"{field}: there is no block {max(first, count)}, the model has {count} blocks",
                hint=f"blocks are counted from 0: 0 to {count - 1}",
            )


class SkippedBlocks(BaseModel):
    """The field that leaves whole blocks dense.

    Args:
        skip: Blocks left dense: numbers and ranges, "0-3,28".
    """

    skip: Blocks = Field(default=())

    @final
    def check_skipped(self, count: int) -> None:
        """Check that a model of `count` blocks has every block that is left dense.

        Raises:
            UsageError: It has not.
        """
        check_blocks("skip", self.skip, count)

    @final
    def skips(self, index: int) -> bool:
        """Tell whether block `index` is left dense."""
        return any(first <= index <= last for first, last in map(_ends, self.skip))


class Targets(SkippedBlocks):
    """The fields that choose linears.

    Args:
        include: Regular expressions searched in a linear's name; only matching linears are pruned.
        exclude: Regular expressions searched in a linear's name; matching linears are left dense.
    """

    include: Patterns = Field(default=())
    exclude: Patterns = Field(default=())

    @final
    def target_linears(self, index: int, found: Sequence[Linear]) -> list[Linear]:
        """Return the linears of block `index` that are to be pruned."""
        return [linear for linear in self.matching_linears(index, found) if self.fits(linear)]

    @final
    def matching_linears(self, index: int, found: Sequence[Linear]) -> list[Linear]:
        """Return the linears of block `index` that the fields name, whether they can be pruned or not."""
        if self.skips(index):
            return []
        return [
            linear
            for linear in found
            if (not self.include or any(re.search(pattern, linear.label) for pattern in self.include))
            and not any(re.search(pattern, linear.label) for pattern in self.exclude)
        ]

    def fits(self, linear: Linear) -> bool:
        """Tell whether a linear that the names choose can be pruned at all."""
        return True
