"""How much leaves, and where; the one rounding rule.

A budget gives each linear its sparsity. Counts are the floor of exact arithmetic on the decimal number the
user wrote: 0.29 of 100 is 29, although the float 0.29 * 100 is below 29.
"""

from collections.abc import Iterable
from fractions import Fraction
from typing import Literal

from structprune.decide.sparsity import check_groups, fraction_of, pattern_of

Compare = Literal["row", "matrix"]


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


def uniform(labels: Iterable[str], sparsity: float | str) -> dict[str, float | str]:
    """Return the budget that gives every linear the same sparsity, by label."""
    return dict.fromkeys(labels, sparsity)
