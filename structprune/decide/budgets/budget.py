"""How much leaves, and where; the one rounding rule.

Counts are the floor of exact arithmetic on the decimal number the user wrote: 0.29 of 100 is 29, although the
float 0.29 * 100 is below 29. A budget that gives linears unequal shares hands out exactly as many removals as
were asked for in total, by largest remainder.

Source: Yin et al. 2023, https://arxiv.org/abs/2310.05175 (OWL)
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor, nn

from structprune.calibration.statistics import InputNorm
from structprune.decide.sparsity import check_groups, fraction_of, pattern_of
from structprune.errors import UsageError

Compare = Literal["row", "matrix"]
Share = Annotated[float, Field(ge=0, lt=1)]


def removed_count(total: int, sparsity: float | str | Fraction) -> int:
    """Return how many of `total` leave at a sparsity: the floor, exactly.

    Args:
        total: How many compete with each other: the inputs of a row, the weights of a matrix.
        sparsity: Fraction removed in [0, 1), or "N:M".
    """
    fraction = sparsity if isinstance(sparsity, Fraction) else fraction_of(sparsity)
    return total * fraction.numerator // fraction.denominator


def removed_weights(shape: tuple[int, int], sparsity: float | str, compare: Compare = "row") -> int:
    """Return how many weights of a matrix will leave: what a sparsity can achieve, known before calibration.

    Args:
        shape: [out, in].
        sparsity: Fraction removed, or "N:M", for which `compare` does not matter.
        compare: Whether the floor is taken in each row or once for the matrix.

    Raises:
        UsageError: The inputs do not divide into groups of M.
    """
    out, inputs = shape
    pattern = pattern_of(sparsity)
    if pattern is not None:
        kept, of = pattern
        check_groups(shape, of)
        return out * (inputs // of) * (of - kept)
    if compare == "row":
        return out * removed_count(inputs, sparsity)
    return removed_count(out * inputs, sparsity)


def apportion(total: int, wanted: Mapping[str, Fraction], sizes: Mapping[str, int]) -> dict[str, int]:
    """Hand out exactly `total` removals: floors first, then the largest remainders, none above its size.

    Args:
        total: How many weights leave altogether.
        wanted: Real-valued removals by name, in proportion to which the total is handed out.
        sizes: How many weights there are, by name; every count stays below.

    Raises:
        UsageError: The total leaves nothing.
    """
    if not 0 <= total < sum(sizes.values()):
        raise UsageError(f"cannot remove {total} of {sum(sizes.values())} weights")
    counts = dict.fromkeys(wanted, 0)
    open_ = list(wanted)
    left = total
    # Whoever would lose more than it has loses all but one weight, and the others share the rest.
    while True:
        asked = sum((wanted[name] for name in open_), Fraction(0))
        scale = Fraction(left) / asked if asked else Fraction(0)
        full = [name for name in open_ if wanted[name] * scale > sizes[name] - 1]
        if not full:
            break
        for name in full:
            counts[name] = sizes[name] - 1
            left -= counts[name]
            open_.remove(name)
    exact = {name: wanted[name] * scale for name in open_}
    counts |= {name: int(value) for name, value in exact.items()}
    short = total - sum(counts.values())
    for name in sorted(open_, key=lambda name: int(exact[name]) - exact[name])[:short]:
        counts[name] += 1
    return counts


class Budget(BaseModel, ABC):
    """Says how unequal the linears' shares are; the total stays what was asked for.

    Attributes:
        measures: Whether it looks at the inputs of the dense model's linears before anything is decided.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    measures: ClassVar[bool] = False

    def measure(self, weights: Sequence[Tensor], statistics: Sequence[InputNorm]) -> float:
        """Return the one number that is remembered of a block; 0 where the budget looks at none.

        Args:
            weights: The chosen linears of the block, each [out, in].
            statistics: What was remembered of each one's input.
        """
        return 0.0

    @abstractmethod
    def shares(self, asked: Fraction, measured: Sequence[float]) -> list[Fraction]:
        """Return the fraction removed from each block, in [0, 1); only the proportions are binding.

        Args:
            asked: Fraction removed altogether.
            measured: One number per block: what `measure` returned, or 0.
        """


class Owl(Budget):
    """Remove less where more scores are outliers: more than `outlier` times the block's mean score.

    Args:
        name: "owl".
        spread: Half the range of the blocks' sparsities (the paper's lambda).
        outlier: How many times the mean makes an outlier (the paper's M).
    """

    name: Literal["owl"] = "owl"
    spread: Annotated[float, Field(gt=0, lt=0.5)] = 0.08
    outlier: Annotated[float, Field(gt=1)] = 5.0

    measures: ClassVar[bool] = True

    def measure(self, weights: Sequence[Tensor], statistics: Sequence[InputNorm]) -> float:
        """Return the share of outliers among the block's scores |W| * ||X||."""
        scores = [weight.float().abs() * stat.norm for weight, stat in zip(weights, statistics, strict=True)]
        size = sum(score.numel() for score in scores)
        # float64, because float32 sums of millions of scores depend on how they are split.
        mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / size
        return sum(int((score > self.outlier * mean).sum()) for score in scores) / size

    def shares(self, asked: Fraction, measured: Sequence[float]) -> list[Fraction]:
        """Return one sparsity per block: the outlier shares scaled to the spread, around their mean."""
        found = [Fraction(value) for value in measured]
        low, high = min(found), max(found)
        if low == high:  # nothing tells the blocks apart
            return [asked] * len(found)
        kept = [(value - low) / (high - low) * 2 * Fraction(str(self.spread)) for value in found]
        mean = sum(kept, Fraction(0)) / len(kept)
        return [_bounded(asked - (value - mean)) for value in kept]


class Ramp(Budget):
    """Remove ever more, or ever less, from the first block to the last.

    Args:
        name: "ramp".
        spread: Half the difference between the last block's sparsity and the first's; negative = falling.
    """

    name: Literal["ramp"] = "ramp"
    spread: Annotated[float, Field(gt=-0.5, lt=0.5)] = 0.08

    def shares(self, asked: Fraction, measured: Sequence[float]) -> list[Fraction]:
        """Return one sparsity per block, on a line through the asked one."""
        last = max(len(measured) - 1, 1)
        spread = Fraction(str(self.spread))
        return [_bounded(asked + spread * (Fraction(2 * block, last) - 1)) for block in range(len(measured))]


class Table(Budget):
    """Remove from each block in proportion to a given number.

    Args:
        name: "table".
        blocks: One sparsity per block, first to last.
    """

    name: Literal["table"] = "table"
    blocks: tuple[Share, ...] = Field(min_length=1)

    def shares(self, asked: Fraction, measured: Sequence[float]) -> list[Fraction]:
        """Return the given sparsities."""
        if len(self.blocks) != len(measured):
            raise UsageError(
                f"budget.blocks: {len(self.blocks)} sparsities for {len(measured)} blocks",
                hint="give one for every decoder block, 0 for those left dense",
            )
        return [Fraction(repr(share)) for share in self.blocks]


class TargetParams(Budget):
    """Remove so much that a number of parameters is left in the whole model, everything unpruned included.

    Args:
        name: "target_params".
        parameters: How many parameters of the model may stay different from zero.
    """

    name: Literal["target_params"] = "target_params"
    parameters: Annotated[int, Field(gt=0)]

    def removed(self, model: nn.Module, prunable: int) -> int:
        """Return how many of the `prunable` weights leave.

        Raises:
            UsageError: They are too few, or the model is smaller already.
        """
        whole = sum(parameter.numel() for parameter in model.parameters())
        if not whole - prunable < self.parameters <= whole:
            raise UsageError(
                f"budget.parameters: {self.parameters} of {whole} parameters cannot be left",
                hint=f"between {whole - prunable + 1} and {whole}: only the chosen linears are pruned",
            )
        return whole - self.parameters

    def shares(self, asked: Fraction, measured: Sequence[float]) -> list[Fraction]:
        """Return the same share for every block."""
        return [asked] * len(measured)


def _read(value: object) -> object:
    """Read "owl" as {"name": "owl"} and "uniform" as no budget at all."""
    if value == "uniform":
        return None
    return {"name": value} if isinstance(value, str) else value


def _bounded(share: Fraction) -> Fraction:
    return min(max(share, Fraction(0)), Fraction(99, 100))


AnyBudget: Any = Annotated[
    Annotated[Owl | Ramp | Table | TargetParams, Field(discriminator="name")] | None, BeforeValidator(_read)
]
"""A pydantic field type: a budget, its name alone for its defaults, or "uniform" (None)."""
