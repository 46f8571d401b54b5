"""ToMe: patches that are alike are merged inside the vision tower, layer by layer.

Source: Bolya et al. 2023, https://arxiv.org/abs/2210.09461
The paper merges 16 patches in every layer; here as many as the target asks for, the same number in every
layer before the features, as far as no layer merges more than half. After every layer patches stand in their
order again, by the first patch of each.
"""

from dataclasses import replace
from typing import ClassVar

from torch import Tensor, tensor
from transformers import PreTrainedConfig

from structprune.errors import QualityError, UsageError
from structprune.models.streamed import Model
from structprune.plan.plan import Plan
from structprune.pruners.forecast import Forecast
from structprune.pruners.token._tower import TowerPruner
from structprune.runtime.drop import Drop, left_of
from structprune.runtime.tower_merge import (
    MergedPatches,
    check_adds,
    check_merges,
    feature_layers,
    square_size,
)
from structprune.solvers.bipartite import least_left, match, merge_counts


class ToMe(TowerPruner):
    """Merge the patches whose keys are alike; of LLaVA-NeXT the target is one of every tile.

    Args:
        proportional: Whether attention counts a merged patch as often as it stands for patches.
    """

    proportional: bool = True

    paper_positions: ClassVar = "compact"

    def forecast(self, model: Model) -> Forecast:
        """Return how many pairs of a visual token and a block are not computed.

        Raises:
            UsageError: As for every method; or patches cannot be merged inside the tower, or not so many.
        """
        layers, size = check_merges(model), square_size(model.config)
        if self.proportional:
            check_adds(model.config)
        found, least = super().forecast(model), least_left(size, layers)
        if (left := int(left_of(self.tokens(model)[0], tensor(size)))) < least:
            raise UsageError(
                f"target: {self.target}: {left} of {size} patches, where {layers} layers of the vision tower "
                f"can leave {least}, for no layer merges more than half of them",
                hint=f"tokens can be from {least} to {size}",
            )
        return found

    def seen_by_tower(self, config: PreTrainedConfig, size: int, left: int) -> list[tuple[int, int]]:
        """Return of every layer of the tower how many patches attention and feed-forward compute."""
        whole = super().seen_by_tower(config, size, left)
        leaving = merge_counts(size, left, feature_layers(config))
        leaving += [left] * (len(whole) - len(leaving))
        return list(zip([size, *leaving], leaving))

    def chosen_in_tower(self, config: PreTrainedConfig, size: int, left: int) -> int:
        """Return what the cosines of both halves cost in every layer."""
        vision = config.vision_config
        width = vision.hidden_size // vision.num_attention_heads
        entering = [size, *merge_counts(size, left, feature_layers(config))][:-1]
        return sum((one + 1) ** 2 // 4 * width for one in entering)

    def drops(self, plan: Plan, model: Model) -> list[Drop]:
        """Return what the engine carries out on a model."""
        layers, size = check_merges(model), square_size(model.config)
        found = []
        for drop in super().drops(plan, model):
            left = size if drop.tokens is None else int(left_of(drop.tokens, tensor(size)))
            if left < size:
                counts = merge_counts(size, left, layers)
                merged = MergedPatches(counts, self._match, size, self.proportional)
                # What is left of each image the tower has decided.
                found.append(replace(drop, tokens=None, images=merged))
        return found

    def _match(self, keys: Tensor, gone: int, protected: int) -> Tensor:
        """Return which patch each one is merged into, by keys of the shape [squares, patches, size]."""
        if not bool(keys.isfinite().all()):
            raise QualityError(
                f"{self.method()}: a key of the vision tower is not finite",
                hint="look whether the model computes NaN on this input, in this dtype",
            )
        return match(keys, gone, protected)
