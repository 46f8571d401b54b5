"""Images of which attention, keys, features and words are given, for methods that look at no more."""

from typing import Any

import torch
from torch import Tensor

from structprune.runtime.tower_tokens import TowerTokens
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


class Ragged(View):
    """Images of different sizes, without ends of lines.

    Args:
        real: Which entries are tokens, bool [images, tokens].
        given: Attention [images, tokens] and keys [images, tokens, size] of every layer of the tower; and
            features and words, [images, tokens, hidden].
    """

    def __init__(self, real: Tensor, **given: Tensor) -> None:
        places = torch.zeros(*real.shape, 3, dtype=torch.long)
        vars(self).update(real=real, left=real.sum(1), places=places, given=given, notes={}, block=0)

    def tower(self, layer: float) -> Any:
        """Return what is given of every layer."""
        return type("Given", (), vars(self)["given"])

    def features(self) -> Tensor:
        """Return what is given."""
        found: Tensor = vars(self)["given"]["features"]
        return found

    def text(self, *, until_next: bool = False) -> tuple[Tensor, Tensor]:
        """Return what is given, all of it text."""
        words = vars(self)["given"]["words"]
        return words, torch.ones(words.shape[:2], dtype=torch.bool)

    def part(self, image: int) -> "Ragged":
        """Return one image alone."""
        size = int(self.left[image])
        given = vars(self)["given"].items()
        mine = {
            name: one[image : image + 1, :size] if name != "words" else one[image : image + 1]
            for name, one in given
        }
        return Ragged(self.real[image : image + 1, :size], **mine)


def ragged(*, outstanding: int = 3, seed: int = 0) -> Ragged:
    """Return images of 64 and 40 tokens: so many of the first stand out, and none of the second."""
    draw = torch.Generator().manual_seed(seed)
    paid = 1 + torch.rand(2, 64, generator=draw)
    paid[0, torch.randperm(64, generator=draw)[:outstanding]] += torch.arange(outstanding) + 10.0
    real = torch.arange(64) < torch.tensor([[64], [40]])
    keys, features = torch.randn(2, 64, 8, generator=draw), torch.randn(2, 64, 16, generator=draw)
    words = torch.randn(2, 5, 16, generator=draw)
    return Ragged(real, attention=paid * real, keys=keys, features=features, words=words)
