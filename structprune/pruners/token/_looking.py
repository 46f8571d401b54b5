"""Methods that ask what the vision tower attends to."""

from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from structprune.pruners.token._family import TokenPruner
from structprune.pruners.token._scored import finite
from structprune.runtime.tower_seen import what_attends
from structprune.runtime.view import View


class LookingTokens(TokenPruner):
    """A pruner that asks what the vision tower attends to.

    Args:
        queries: Whose attention counts: that of the class token, where there is one, as in papers; or of all
            patches alike. A tower that was trained with its language model alone, not as CLIP is, never
            learnt what its class token should look at.
    """

    queries: Literal["class", "all"] = "class"

    def facts(self, model: PreTrainedModel) -> dict[str, str]:
        """Return whose attention counts on a model."""
        return {"attention": what_attends(model, class_token=self.queries == "class")}

    def attention(self, seen: View, layer: float = -2) -> Tensor:
        """Return the attention that tokens get in a layer of the tower, float32 [images, tokens].

        Raises:
            QualityError: One is not a number.
        """
        shown = seen.tower(layer)
        found = shown.attention if self.queries == "class" else shown.received
        return finite(found, seen.real, self.method())
