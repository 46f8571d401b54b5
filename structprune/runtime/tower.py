"""A vision tower that computes fewer features: they stand among the placeholders of all.

The features stand where the image's own tokens of the same region do; between them there are zeros, which a
drop at the embeddings takes away. Where images are made smaller for the tower, what it knows of places is
interpolated, as transformers does where images have another size.
"""

import inspect
from dataclasses import dataclass
from math import isqrt
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from structprune.errors import UsageError
from structprune.models.streamed import Model, StreamedModel
from structprune.runtime.flops import image_tokens

# What tells a tower of transformers that an image has another size than it was trained for.
ANY_SIZE = "interpolate_pos_encoding"


class TowerCall:
    """One call of `get_image_features` whose tower computes fewer features than there are patches.

    Args:
        given: The arguments of the call, by name.
        filled: Among which patches the features stand, bool [squares, patches]; the class token of a tower
            that has one among them. Known once the tower has run.

    Attributes:
        within: States of the layer that runs now before and after they are merged; None where they are not.
    """

    def __init__(self, given: dict[str, Any], filled: Tensor) -> None:
        self.given, self.filled = given, filled
        self.within: tuple[Tensor, Tensor] | None = None

    def mask(self, states: Tensor) -> Tensor | None:
        """Return what is added to the scores of a layer's attention, which reads these states."""
        return None

    def note_keys(self, keys: Tensor) -> None:
        """Note the keys of a layer's attention, mean over heads, float32 [squares, patches, size]."""

    def merged(self, layer: int, states: Tensor) -> Tensor | None:
        """Return states for a layer's feed-forward, after attention and residual; None: all go on.

        Args:
            layer: Its number.
            states: Shape [squares, patches, hidden].
        """
        return None


class FewerFeatures(Protocol):
    """What lets the tower of one model compute fewer features."""

    def begin(self, given: dict[str, Any], *, class_token: bool) -> TowerCall:
        """Return what one call of `get_image_features` does.

        Args:
            given: Its arguments, by name.
            class_token: Whether a first token of the tower stands for the whole image.
        """
        ...


@dataclass(frozen=True)
class SmallerImages:
    """Images are made smaller before the tower.

    Args:
        side: Patches each way that images come with.
        smaller: Patches each way that the tower shall see.
        patch: Pixels of a patch each way.
    """

    side: int
    smaller: int
    patch: int

    def begin(self, given: dict[str, Any], *, class_token: bool) -> TowerCall:
        """Return a call with smaller images.

        Raises:
            UsageError: The images have another size than the processor gives them.
        """
        pixels, size = given["pixel_values"], self.side * self.patch
        if pixels.ndim != 4 or pixels.shape[-2:] != (size, size):
            raise UsageError(
                f"pixel_values {[*pixels.shape]}: images of {size} x {size} pixels are made smaller",
                hint="pass what the model's processor returns",
            )
        filled = torch.zeros(self.side**2 + class_token, dtype=torch.bool)
        filled[:class_token] = True
        filled[grid_places(self.smaller, self.side) + class_token] = True
        smaller = {"pixel_values": self._resized(pixels), ANY_SIZE: True}
        return TowerCall(given | smaller, filled.expand(len(pixels), -1))

    def _resized(self, pixels: Tensor) -> Tensor:
        """Return images as a processor would resize them, but not rounded to 8 bits again."""
        size = (self.smaller * self.patch,) * 2
        small = nn.functional.interpolate(pixels.float(), size, mode="bicubic", antialias=True)
        return small.to(pixels.dtype)


def grid_places(smaller: int, side: int) -> Tensor:
    """Return where the features of a smaller image stand among the patches of the whole one, ascending.

    Args:
        smaller: Patches each way of the smaller image.
        side: Patches each way of the whole one.

    Returns:
        Places, shape [smaller * smaller]: the last patch, in reading order, of the region that each covers.
    """
    line = (torch.arange(smaller) + 1) * side // smaller - 1
    return (line[:, None] * side + line).flatten()


def smaller_images(model: PreTrainedModel, tokens: int) -> SmallerImages | None:
    """Return what runs a model's tower on images of so many tokens; None where that is all of them.

    Raises:
        UsageError: Its tower cannot be run on smaller images.
    """
    size = square_of(model)
    if tokens == size:
        return None
    return SmallerImages(isqrt(size), isqrt(tokens), model.config.vision_config.patch_size)


def square_of(model: Model) -> int:
    """Return how many tokens an image of a model has, a square number.

    Raises:
        UsageError: Its tower cannot be run on smaller images.
    """
    size = image_tokens(model.config)
    whole = model.skeleton if isinstance(model, StreamedModel) else model
    tower: Any = getattr(whole.base_model, "vision_tower", None)
    takes = tower is not None and ANY_SIZE in inspect.signature(tower.forward).parameters
    if size is None or isqrt(size) ** 2 != size or not takes:
        raise UsageError(
            f"images of this {model.config.model_type} cannot be made smaller before its vision tower: only a"
            " LLaVA's can, whose tower takes squares and gives a feature for every patch",
            hint="lower the resolution in the model's processor, or choose grid_tokens",
        )
    return size
