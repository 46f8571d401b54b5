"""What a stage will do, said before any data is looked at."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from transformers import PreTrainedModel

from structprune.decide.sparsity import PATTERN, fraction_of
from structprune.errors import UsageError
from structprune.models.streamed import Model

logger = logging.getLogger(__name__)

# Of what was asked for: below the first share the request was not understood, below the second it is told.
LEAST = Fraction(1, 2)
ENOUGH = Fraction(9, 10)


@dataclass(frozen=True)
class WholeUnits:
    """Units that are few and leave whole, so that a share of them is a number.

    Attributes:
        units: What they are, in words.
        most: At most so many leave.
        of: How many there are.
    """

    units: str
    most: int
    of: int


@dataclass(frozen=True)
class Forecast:
    """What one stage was asked for, what rounding lets it reach, and what it leaves.

    Attributes:
        unit: What is counted: "weights", "parameters", "visual tokens" ...; figures of different units are
            never added.
        asked: What was asked for, as the user says it.
        reachable: How many of the units leave, those that are gone already included; None where the data
            decides.
        of: Of how many, those that are gone already included.
        left: A twin on the meta device with the modules and the configuration that the stage leaves; the next
            stage's forecast takes it, and sizes are counted from it.
        exact: Whether `left` is exactly what will be; else only the rounding multiple is sure.
        found: How many of the units are gone already.
        near: What could be asked for instead and be reached, next below and above; empty where any can.
        by_rounding: Whether rounding alone stands between what was asked and what is reached; folded products
            hold no zeros on purpose.
        trials: How many forwards over all calibration data a search takes, at most.
        notes: What else is worth knowing before anything runs, a sentence each.
    """

    unit: str
    asked: float | str
    reachable: int | None
    of: int
    left: PreTrainedModel
    exact: bool = True
    found: int = 0
    near: tuple[float, ...] = ()
    by_rounding: bool = True
    trials: int = 0
    notes: tuple[str, ...] = ()

    @property
    def wanted(self) -> Fraction | None:
        """Return the share that was asked for; None where it is not said as one."""
        if isinstance(self.asked, str):
            return fraction_of(self.asked) if PATTERN.fullmatch(self.asked) else None
        return fraction_of(self.asked) if 0 <= self.asked <= 1 else None

    @property
    def share(self) -> float | None:
        """Return the share that will be gone; None where the data decides."""
        return None if self.reachable is None else self.reachable / self.of if self.of else 0.0

    def check(self) -> None:
        """Say what is worth knowing; hold what rounding reaches against what was asked for.

        Raises:
            UsageError: Not half of it is reached; names what could be.
        """
        for note in self.notes:
            logger.warning("%s", note)
        if not self.wanted or self.reachable is None or not self.of or not self.by_rounding:
            return
        reached = Fraction(self.reachable, self.of)
        said = f"asked for {self.asked} of the {self.unit}, whole units reach {float(reached):.3g}"
        near = " or ".join(f"{value:g}" for value in self.near)
        if reached < LEAST * self.wanted:
            raise UsageError(said, hint=f"ask for {near or 'more'}")
        if reached < ENOUGH * self.wanted:
            logger.warning("%s%s", said, f"; {near} would be reached" if near else "")
        if self.found > self.reachable:
            logger.warning(
                "asked for %s of the %s, %.3g of them are gone already and will not come back",
                self.asked,
                self.unit,
                self.found / self.of,
            )


class Forecasting(Protocol):
    """A stage that can be asked before it runs."""

    def forecast(self, model: Model) -> Forecast:
        """Return what the stage will do to a model."""


def forecast_all(stages: Sequence[Forecasting], model: Model) -> list[Forecast]:
    """Ask every stage what it will do, each on what the one before it leaves.

    Args:
        stages: In order.
        model: In memory or streamed.

    Raises:
        UsageError: A stage cannot prune what it will find, or can do less than half of what it was asked for.
    """
    found: list[Forecast] = []
    for stage in stages:
        found.append(stage.forecast(found[-1].left if found else model))
        found[-1].check()
    return found
