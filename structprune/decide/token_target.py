"""How many visual tokens shall be left, in the units that papers use, and what that makes at one place."""

from collections.abc import Callable
from fractions import Fraction
from math import ceil, floor
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from structprune.decide.sparsity import fraction_of
from structprune.errors import UsageError

Part = Annotated[float, Field(gt=0, le=1)]


class Target(BaseModel):
    """How much is left; one of these.

    Args:
        keep_ratio: Share of an image's tokens that the last block computes.
        tokens: How many tokens of each image the last block computes.
        avg_tokens: How many tokens of an image a block computes, the mean over blocks.
        visual_flops: Share of the operations that visual tokens cost in the language model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep_ratio: Part | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None
    avg_tokens: Annotated[float, Field(ge=1)] | None = None
    visual_flops: Part | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (getattr(self, name) for name in type(self).model_fields)) != 1:
            raise ValueError(f"target: say exactly one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def name(self) -> str:
        """Return which of them is asked for."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def value(self) -> float | int:
        """Return what is asked for."""
        found: float | int = getattr(self, self.name)
        return found

    def __str__(self) -> str:
        return f"{self.name} {self.value:g}"


def half_up(value: Fraction) -> int:
    """Return the nearest whole number, the upper one of two."""
    return floor(value + Fraction(1, 2))


def count_at(target: Target, size: int, before: Fraction, operations: Callable[[int], int]) -> int:
    """Return how many of an image's tokens are left when they are dropped once: the nearest reachable count.

    Args:
        target: What is asked for.
        size: Tokens of the image.
        before: Share of the blocks that compute all of them.
        operations: Operations of a block with so many tokens.

    Raises:
        UsageError: Less than one token would be left, or the blocks before cost more already; says what can
            be reached.
    """
    match target.name:
        case "keep_ratio":
            wanted = fraction_of(target.value) * size
        case "tokens":
            wanted = Fraction(target.value)
        case "avg_tokens":
            wanted = (fraction_of(target.value) - before * size) / (1 - before)
        case _:
            full = operations(size)
            after = (fraction_of(target.value) - before) / (1 - before) * full
            wanted = Fraction(_nearest(after, size, operations))
            if after < operations(1):
                wanted = Fraction(0)
    if wanted < 1:
        # Rounded up, for what is said must be reachable.
        least = rounded_up(_least(target, size, before, operations))
        raise UsageError(
            f"target: {target} leaves less than one token of an image of {size}",
            hint=f"{target.name} can be from {least:g} to {size if 'tokens' in target.name else 1}",
        )
    return min(half_up(wanted), size)


def _nearest(after: Fraction, size: int, operations: Callable[[int], int]) -> int:
    """Return the count whose operations are nearest, by bisection: they grow with the count."""
    low, high = 1, size
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if operations(middle) < after else (low, middle)
    if low > 1 and after - operations(low - 1) <= operations(low) - after:
        return low - 1
    return low


def _least(target: Target, size: int, before: Fraction, operations: Callable[[int], int]) -> Fraction:
    match target.name:
        case "keep_ratio":
            return Fraction(1, size)
        case "tokens":
            return Fraction(1)
        case "avg_tokens":
            return before * size + (1 - before)
    return before + (1 - before) * Fraction(operations(1), operations(size))


def rounded_up(value: Fraction) -> float:
    """Return the next number of four digits after the point, which can be asked for where the value can."""
    return ceil(value * 10**4) / 10**4
