"""What a stage will do, said before any data is looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel

from structprune.models.streamed import Model


@dataclass(frozen=True)
class Forecast:
    """What one stage was asked for, what rounding lets it reach, and what it leaves.

    Attributes:
        unit: What is counted: "weights", "parameters", "visual tokens" ...; figures of different units are
            never added.
        asked: What was asked for, as the user says it.
        reachable: How many of the units leave; None where the data decides.
        of: Of how many.
        left: A twin on the meta device with the modules and the configuration that the stage leaves; the next
            stage's forecast takes it, and sizes are counted from it.
        exact: Whether `left` is exactly what will be; else only the rounding multiple is sure.
    """

    unit: str
    asked: float | str
    reachable: int | None
    of: int
    left: PreTrainedModel
    exact: bool = True


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
        UsageError: A stage cannot prune what it will find.
    """
    found: list[Forecast] = []
    for stage in stages:
        found.append(stage.forecast(found[-1].left if found else model))
    return found
