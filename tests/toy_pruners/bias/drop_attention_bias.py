"""A family of one method, which the rest of the house has never heard of: attention without its biases.

Source: Touvron et al. 2023, https://arxiv.org/abs/2302.13971 (Llama has none)
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch

from structprune.models.arch import arch_of, blocks
from structprune.models.edit import left_of
from structprune.models.identity import names_of, skeleton, weights_of
from structprune.models.streamed import Batch, Model
from structprune.models.tensor_edit import Outline
from structprune.plan.key import Key
from structprune.plan.plan import Plan, PlanWriter
from structprune.plan.promise import Gone, Promises
from structprune.pruners.forecast import Forecast
from structprune.pruners.pruner import Pruner

PATCH = {"attention_bias": False}


class DropAttentionBias(Pruner):
    """Drop all biases of the attention's projections, each of shape [out], or none.

    Args:
        amount: How much of them leaves: 0 or 1.
    """

    amount: Literal[0, 1] = 1

    needs_data: ClassVar[bool] = False

    def with_goal(self, goal: float | str) -> Self:
        """Return the same pruner with another amount."""
        return type(self).model_validate({"amount": int(goal)})

    def forecast(self, model: Model) -> Forecast:
        """Return how many parameters leave."""
        sizes = {name: size for block in self._biases(model) for name, size in block.items()}
        dropped = Outline({Key(name, "drop"): (0,) for name in sizes} if self.amount else {})
        left = left_of(model, dropped, PATCH if self.amount else {})
        return Forecast(
            "parameters", self.amount, self.amount * sum(sizes.values()), sum(sizes.values()), left
        )

    def calibrate(self, model: Model, batches: Sequence[Batch], plan: PlanWriter | None = None) -> Plan:
        """Decide block by block; no data is needed."""
        writer = plan or self.writer(None, model, weights_of(model))
        found = self._biases(model)
        for block in found[writer.finished :] if self.amount else ():
            writer.write({Key(name, "drop"): torch.empty(0) for name in block}, {"dropped": len(block)})
        of = sum(size for block in found for size in block.values())
        gone = [Gone(tensors=tuple(name for block in found for name in block))] if self.amount else []
        promises = Promises(
            unit="parameters", asked=self.amount, removed=self.amount * of, of=of, stored=gone
        )
        return writer.finish({}, promises=promises, patch=PATCH if self.amount else {})

    def _biases(self, model: Model) -> list[dict[str, int]]:
        """Return, block by block, the stored name and size of every bias of the attention."""
        names, attention = names_of(model), arch_of(skeleton(model)).attention
        return [
            {
                stored: parameter.numel()
                for path, parameter in block.get_submodule(attention).named_parameters()
                if path.endswith("bias")
                for stored in names.stored_of[f"{prefix}.{attention}.{path}"]
            }
            for prefix, block in blocks(model)
        ]
