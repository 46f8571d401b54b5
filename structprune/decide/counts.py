"""How many leave, in whole numbers; the one rounding rule.

Counts are the floor of exact arithmetic on the decimal number the user wrote: 0.29 of 100 is 29, although the
float 0.29 * 100 is below 29. A budget that gives linears unequal shares hands out exactly as many removals as
were asked for in total, by largest remainder.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

from structprune.decide.sparsity import Amount, check_groups, fraction_of, pattern_of
from structprune.errors import UsageError

# Rows are not so unequal that more steps of the smallest one were needed for nine tenths of every other.
STEPS = 64

Compare = Literal["row", "matrix"]
"""Which weights compete at an unstructured sparsity: those of a row, or all of a matrix."""


def removed_count(total: int, sparsity: Amount) -> int:
    """Return how many of `total` leave at a sparsity: the floor, exactly.

    Args:
        total: How many compete with each other: the inputs of a row, the weights of a matrix.
        sparsity: Fraction removed in [0, 1), or a pattern.
    """
    fraction = fraction_of(sparsity)
    return total * fraction.numerator // fraction.denominator


def removed_weights(shape: tuple[int, int], sparsity: Amount, compare: Compare = "row") -> int:
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


def reached_near(
    shapes: Sequence[tuple[int, int]], sparsity: float | str, compare: Compare = "row"
) -> tuple[float, ...]:
    """Return the sparsities next to one, below and above, of which rounding reaches nine tenths or more.

    Args:
        shapes: [out, in] of every matrix.
        sparsity: What was asked for.
        compare: As for `removed_weights`.

    Returns:
        One below or 0, and one above where there is one, rounded up to three digits; nothing for a pattern,
        of which every group loses the same.
    """
    if pattern_of(sparsity) is not None:
        return ()
    asked, many = fraction_of(sparsity), Counter(shapes)
    of = sum(out * inputs * count for (out, inputs), count in many.items())

    def is_reached(share: Fraction) -> bool:
        reached = sum(removed_weights(shape, share, compare) * count for shape, count in many.items())
        return reached * 10 >= share * of * 9

    # Something changes only where another weight of some row, or matrix, leaves. A few steps away from the
    # asked one it is reached by all but the smallest of them.
    sizes = {inputs if compare == "row" else out * inputs for out, inputs in many}
    steps = {
        Fraction(count, size)
        for size in sizes
        for count in range(max(int(asked * size) - STEPS, 0), min(int(asked * size) + STEPS, size))
    }
    below = next(
        filter(is_reached, sorted((one for one in steps if one <= asked), reverse=True)), Fraction(0)
    )
    above = next(filter(is_reached, sorted(one for one in steps if one > asked)), None)
    return tuple(_shown(one) for one in (below, above) if one is not None)


def _shown(share: Fraction) -> float:
    """Return a share as a short decimal that is not below it: what is below would lose one weight less."""
    if not share:
        return 0.0
    digits = 3 - math.floor(math.log10(share)) - 1
    return float(Fraction(math.ceil(share * 10**digits), 10**digits))


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
        raise UsageError(
            f"cannot remove {total} of {sum(sizes.values())} weights",
            hint="at least one weight must stay: ask for less",
        )
    counts = dict.fromkeys(wanted, 0)
    open_ = list(wanted)
    left = total
    # Whoever would lose more than it has loses all but one weight, and the others share the rest; that raises
    # their scale, so that another may now be full: ask again until none is.
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
    # The sort is stable: among equal remainders the first name is served.
    for name in sorted(open_, key=lambda name: int(exact[name]) - exact[name])[:short]:
        counts[name] += 1
    return counts
