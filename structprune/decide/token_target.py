"""How many visual tokens shall be left, in the units that papers use, and what that makes at one place."""

from collections.abc import Callable, Mapping
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


def count_of(size: int, share: float) -> int:
    """Return how many tokens a share of so many is, half up."""
    # Rounded first, or 0.29 * 100 were 28.
    return floor(round(size * share, 9) + 0.5)


def count_at(target: Target, size: int, before: Fraction, operations: Callable[[int], int]) -> int:
    """Return how many of an image's tokens are left when they are dropped once, as `counts_at` does.

    Args:
        target: What is asked for.
        size: Tokens of the image.
        before: Share of the blocks that compute all of them.
        operations: Operations of a block with so many tokens.
    """
    return counts_at(target, size, {before.numerator: 1.0}, before.denominator, operations)[-1]


def counts_at(
    target: Target, size: int, stages: Mapping[int, float], blocks: int, operations: Callable[[int], int]
) -> list[int]:
    """Return how many of an image's tokens each block computes: the nearest reachable counts.

    One number is free, the share that is left at the end; what is left before are powers of it.

    Args:
        target: What is asked for.
        size: Tokens of the image.
        stages: Number of a block before which tokens are dropped -> the power of that share that is left from
            there on; 1 at the last.
        blocks: How many there are.
        operations: Operations of a block with so many tokens.

    Raises:
        UsageError: Less than one token would be left, or the first blocks cost more already; says what can
            be reached.
    """
    powers = [0.0]
    for block in range(blocks):
        powers.append(stages.get(block, powers[-1]))

    def counts(share: float) -> list[int]:
        return [min(max(count_of(size, share**power), 1), size) for power in powers[1:]]

    def computed(share: float) -> Fraction:
        """Return what a block computes in the mean, of tokens or of the operations for all of them."""
        if target.name == "avg_tokens":
            return Fraction(sum(counts(share)), blocks)
        return Fraction(sum(map(operations, counts(share))), blocks * operations(size))

    asked, one = fraction_of(target.value), 1 / size
    match target.name:
        case "keep_ratio":
            least = Fraction(1, size)
        case "tokens":
            least = Fraction(1)
        case _:
            least = computed(one)
    if asked < least:
        # Rounded up, for what is said must be reachable.
        raise UsageError(
            f"target: {target} leaves less than one token of an image of {size}",
            hint=f"{target.name} can be from {rounded_up(least):g} to "
            f"{size if 'tokens' in target.name else 1}",
        )
    match target.name:
        case "keep_ratio":
            return counts(float(asked))
        case "tokens":
            return counts(min(float(asked) / size, 1.0))
    low, high = one, 1.0
    # As many halvings as a float has bits: then nothing lies between the two.
    for _ in range(53):
        middle = (low + high) / 2
        low, high = (middle, high) if computed(middle) <= asked else (low, middle)
    return counts(low if asked - computed(low) < computed(high) - asked else high)


def rounded_up(value: Fraction) -> float:
    """Return the next number of four digits after the point, which can be asked for where the value can."""
    return ceil(value * 10**4) / 10**4
