"""Methods that spare the vision tower too: what it computes takes the place of all tokens of an image."""

from typing import final

import torch
from torch import Tensor

from structprune.errors import UsageError
from structprune.pruners.token._family import TokenPruner
from structprune.runtime.view import View


class TowerPruner(TokenPruner):
    """A pruner whose `Drop.images` lets the vision tower compute fewer features."""

    @final
    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return the tokens in whose place there are features, bool, shape [images, tokens].

        Raises:
            UsageError: The features were not made by the tower as it runs here, or were dropped before.
        """
        whole = torch.equal(seen.left + seen.protected, seen.sizes)
        filled = seen.filled() if whole and all(seen.images.shown) else None
        if filled is None:
            raise UsageError(
                f"{self.method()}: the features of an image are not those of a tower that it spares",
                hint=f"pass pixel_values, and let no other method drop tokens before {self.method()}",
            )
        return filled
