"""LLM-Pruner: remove the groups and channels whose removal changes the loss least, by its Taylor expansion.

Source: Ma et al. 2023, https://arxiv.org/abs/2305.11627

Hidden channels stay. Deviations from the released code: a key-value group has the scores of its own query
heads a // (heads / kv_heads), which the code mixes up; "vector" takes the absolute value of the sum over the
whole unit, the first-order change of the loss, not row by row.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from structprune.calibration.statistics import Parts
from structprune.decide.unit_counts import WidthUnit, unit_places
from structprune.models.arch import Linear, arch_of
from structprune.models.gradients import GradientMeans
from structprune.models.identity import skeleton
from structprune.models.streamed import Model
from structprune.models.walk import Block
from structprune.pruners.seen import Seen
from structprune.pruners.structure._width import WidthPruner
from structprune.pruners.structure._width_block import WidthBlock

_PARTS: Mapping[str, Parts] = {
    "vector": frozenset({"gradient"}),
    "element1": frozenset({"gradient"}),
    "element2": frozenset({"gradient_l2"}),
    "mixed": frozenset({"gradient", "gradient_l2"}),
}


class LlmPruner(WidthPruner):
    """Score a unit by how much the loss would change without its weights, in all matrices that hold them.

    With G the mean gradient over samples and A the mean of its square (the diagonal of the Fisher matrix):

    Args:
        score: "vector": |sum W G|; "element1": sum |W G|; "element2": sum |W A W|; "mixed":
            sum |W G - W A W / 2|, of which the second term hardly counts.
    """

    # The paper reports all of them; without any training afterwards the squares choose best here.
    score: Literal["vector", "element1", "element2", "mixed"] = "element2"

    @property
    def needs(self) -> Parts:
        """Return the means of the gradient that the score is made of."""
        return _PARTS[self.score]

    def reduce_gradients(
        self, model: Model, block: Block, found: Mapping[str, GradientMeans]
    ) -> dict[str, Tensor]:
        """Return the scores of a block's units by kind, shape [units] each: gradients go no further."""
        readers, arch = self.readers(block), arch_of(skeleton(model))
        linears = {one.name.removeprefix(f"{block.prefix}."): one for one in block.linears}
        scores: dict[str, Tensor] = {}
        for kind in readers:
            places = [place for place in unit_places(block.module, arch, kind) if place.path in linears]
            total = torch.zeros(int(places[0].indices.max()) + 1, dtype=torch.float64)
            for place in places:
                linear = linears[place.path]
                terms = self.terms(linear.weight.float(), found[linear.label])
                axis = 1 - place.axis if linear.transposed else place.axis
                lines = terms.sum(dim=1 - axis, dtype=torch.float64).cpu()
                mine = place.indices >= 0
                total.index_add_(0, place.indices[mine], lines[mine])
            scores[kind] = total.abs()
        return scores

    def terms(self, weight: Tensor, gradient: GradientMeans) -> Tensor:
        """Return what each weight adds to the score of its unit, shape [out, in], float32.

        Args:
            weight: Shape [out, in], float32.
            gradient: Of the weight.
        """
        match self.score:
            case "vector":
                return weight * gradient.signed
            case "element1":
                return (weight * gradient.signed).abs()
            case "element2":
                return (weight * gradient.l2).square()
        return (weight * gradient.signed - (weight * gradient.l2).square() / 2).abs()

    def score_units(
        self, known: WidthBlock, readers: Mapping[WidthUnit, Linear], seen: Seen
    ) -> dict[WidthUnit, Tensor]:
        """Return what the walk backward left of each kind, shape [units] each."""
        return {kind: seen.gradients[kind] for kind in readers}
