"""The vision tower run on smaller images: its fewer features stand among the placeholders of all.

What the tower knows of places is interpolated, as transformers does where images have another size. The
features stand where the image's own tokens of the same region do; between them there are zeros, which a drop
at the embeddings takes away.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from structprune.errors import UsageError
from structprune.models.streamed import Model, StreamedModel
from structprune.runtime.flops import image_tokens

# What tells a tower of transformers that an image has another size than it was trained for.
ANY_SIZE = "interpolate_pos_encoding"


@dataclass(frozen=True)
class SmallerImages:
    """`get_image_features` of one model, on images that are made smaller first.

    Args:
        side: Patches each way that images come with.
        smaller: Patches each way that the tower shall see.
        patch: Pixels of a patch each way.
    """

    side: int
    smaller: int
    patch: int

    def features(self, method: Callable[..., Any], given: dict[str, Any]) -> Any:
        """Return what the method returns, with zeros between the features that the tower computed.

        Args:
            method: The model's own `get_image_features`.
            given: What it is called with, by name.

        Returns:
            Its features have the shape [side * side, hidden] of every image.

        Raises:
            UsageError: The images have another size than the processor gives them.
        """
        pixels, size = given["pixel_values"], self.side * self.patch
        if pixels.ndim != 4 or pixels.shape[-2:] != (size, size):
            raise UsageError(
                f"pixel_values {[*pixels.shape]}: images of {size} x {size} pixels are made smaller",
                hint="pass what the model's processor returns",
            )
        # By name: defaults of the config are added to what was said so.
        found = method(**given | {"pixel_values": self._resized(pixels), ANY_SIZE: True})
        few = torch.stack([*found.pooler_output])
        whole = few.new_zeros(len(few), self.side**2, few.shape[-1])
        whole[:, grid_places(self.smaller, self.side).to(few.device)] = few
        found.pooler_output = list(whole)
        return found

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
