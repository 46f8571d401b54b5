"""Images of which attention, keys and features are given, for methods that look at no more."""

import torch
from torch import Tensor

from structprune.runtime.tower_seen import TowerTokens
from structprune.runtime.view import View


class Seen(View):
    """Images of so many tokens each way.

    Args:
        attention: At each layer of the tower, float32 [images, tokens].
        features: Float32 [images, tokens, features].
        side: Tokens each way.
    """

    def __init__(self, attention: dict[float, Tensor], features: Tensor, side: int) -> None:
        places = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), *[torch.arange(side)] * 2)
        images, size = features.shape[:2]
        vars(self).update(
            block=0,
            real=torch.ones(images, size, dtype=torch.bool),
            left=torch.full((images,), size),
            places=places.expand(images, -1, -1),
            attention=attention,
            given=features,
        )

    def tower(self, layer: float) -> TowerTokens:
        """Return what is given of a layer."""
        found = object.__new__(TowerTokens)
        vars(found)["attention"] = vars(self)["attention"][layer]
        return found

    def features(self) -> Tensor:
        """Return what is given."""
        found: Tensor = vars(self)["given"]
        return found
