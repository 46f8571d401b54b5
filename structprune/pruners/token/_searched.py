"""Methods whose values may be searched for: those that change least what the model says, at the same cost."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from structprune.calibration.notebook import Look, Notebook
from structprune.errors import InputError, UsageError
from structprune.models.streamed import Batch, Model
from structprune.plan.plan import Plan
from structprune.pruners.forecast import Forecast
from structprune.pruners.token._family import TokenPruner
from structprune.runtime.attach import attach, detach
from structprune.runtime.drop import Drop
from structprune.solvers.token_search import agreement_of, best, last_states, search


class SearchedTokens(TokenPruner):
    """A pruner whose values can be searched for.

    Args:
        trials: How many values are tried on calibration prompts, at the same cost; none unless asked.
        seed: Draws them.

    Attributes:
        ranges: Name of a value -> the least and the largest that is tried.
    """

    trials: Annotated[int, Field(ge=0)] = 0
    seed: int = 0

    reads: ClassVar = "images"
    ranges: ClassVar[Mapping[str, tuple[float, float]]]

    @abstractmethod
    def with_values(self, values: Mapping[str, float]) -> Self:
        """Return the same pruner with values of a trial, by name."""

    @property
    def looks_at_data(self) -> bool:
        """Tell whether values are searched for on calibration prompts."""
        return self.trials > 0

    def forecast(self, model: Model) -> Forecast:
        """Return how many pairs of a visual token and a block are not computed.

        Raises:
            UsageError: As for every method; or values of different cost would be tried.
        """
        if self.trials and self.target.name not in ("avg_tokens", "visual_flops"):
            raise UsageError(
                f"target: {self.target}: trials at which the last block computes as much cost differently",
                hint="ask for avg_tokens or visual_flops, or set trials: 0",
            )
        return super().forecast(model)

    def decide(self, model: Model, batches: Sequence[Batch], look: Look) -> dict[int, Tensor]:
        """Return of the blocks where tokens are dropped how many are left; by the best trial, if any."""
        if not self.trials:
            return self.tokens(model)
        whole = self._in_memory(model)
        dense = last_states(whole, batches)

        def agreement(values: Mapping[str, float]) -> float:
            tried = self.with_values(values)
            drops = [Drop(block, False, tokens, tried) for block, tokens in tried.tokens(model).items()]
            attach(whole, "search", drops)
            try:
                return agreement_of(last_states(whole, batches), dense)
            finally:
                detach(whole, "search")

        search(self.ranges, agreement, self.trials, self.seed, look)
        return self.with_values(best(look.notes, self.ranges, self.trials)).tokens(model)

    def rules(self, notes: Notebook) -> dict[int, Tensor]:
        """Return the values of the best trial, at the first stage."""
        if not self.trials:
            return {}
        found = best(notes, self.ranges, self.trials)
        return {0: torch.tensor([*found.values()], dtype=torch.float64)}

    def drops(self, plan: Plan, model: Model) -> list[Drop]:
        """Return what the engine carries out on a model, by the values of the best trial.

        Raises:
            InputError: As for every method; or the plan's values are none of a trial.
        """
        found, every = [plan[key] for key in plan if key.kind == "rule"], super().drops(plan, model)
        if not found:
            return every
        ends = torch.tensor([*self.ranges.values()], dtype=torch.float64)
        values = found[0].flatten()
        if len(values) != len(ends) or not bool(((ends[:, 0] <= values) & (values <= ends[:, 1])).all()):
            raise InputError(
                f"{self.method()}: the plan's rule {values.tolist()}, expected values of {dict(self.ranges)}",
                hint="the plan is damaged: prune again with its recipe",
            )
        chooser = self.with_values(dict(zip(self.ranges, values.tolist(), strict=True)))
        return [replace(one, chooser=chooser) for one in every]
