"""What was found of the units of depth, and which of them leave."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from structprune.decide.depth import DepthUnit


@dataclass(frozen=True)
class Verdict:
    """What was found of a unit.

    Attributes:
        score: What it was chosen by; None where nobody asked.
        leaves: Whether it leaves.
    """

    score: float | None
    leaves: bool


Verdicts = Mapping[DepthUnit, Verdict]
"""Those that leave stand first, in the order in which they were chosen."""


def gone_units(leaving: Verdicts) -> list[DepthUnit]:
    """Return the units that leave, in the order in which they were chosen."""
    return [unit for unit, verdict in leaving.items() if verdict.leaves]


def blocks_left(gone: Sequence[DepthUnit], depth: int) -> list[int]:
    """Return the indices of the blocks that stay of a model of so many, ascending."""
    numbers = {one.block for one in gone}
    return [index for index in range(depth) if index not in numbers]
