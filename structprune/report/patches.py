"""A picture as a model sees it, and which part of it each of its visual tokens stands for."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedConfig, ProcessorMixin

from structprune.errors import UsageError
from structprune.models.streamed import Batch


@dataclass(frozen=True, eq=False)
class Patches:
    """A picture, cut into as many parts as it has visual tokens.

    Attributes:
        pixels: As the model sees it: resized, cropped; shape [3, height, width], uint8, red green blue.
        rows: Parts from top to bottom.
        columns: Parts from left to right; tokens go row by row.
        before: Tokens before the first part, which stand for no place; -1 where the first part has none.
    """

    pixels: Tensor
    rows: int
    columns: int
    before: int = 0

    def parts(self, tokens: Tensor) -> Tensor:
        """Return what is said of each visual token, shape [tokens], by its place, shape [rows, columns]."""
        return functional.pad(tokens, (-self.before, 0)).view(self.rows, self.columns)


def patches_of(config: PreTrainedConfig, batch: Batch, processor: ProcessorMixin, tokens: int) -> Patches:
    """Return the picture of a prompt with one image.

    Args:
        config: The model's.
        batch: What the processor made of the prompt.
        processor: The model's, which knows how it scaled the pixels.
        tokens: How many visual tokens there are.

    Raises:
        UsageError: Where they stand on the picture is not known.
    """
    call: Any = processor
    images, vision = call.image_processor, config.vision_config
    pixels = batch["pixel_values"].float().cpu()
    if "image_grid_thw" in batch:
        _, rows, columns = batch["image_grid_thw"][0].tolist()
        merged = vision.spatial_merge_size
        # Patches that are merged into one token stand side by side, each with its pixels over two frames.
        sizes = (rows // merged, columns // merged, merged, merged, -1, vision.temporal_patch_size)
        patches = pixels.view(*sizes, vision.patch_size, vision.patch_size)[..., 0, :, :]
        picture = patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(-1, *_sides(rows, columns, vision.patch_size))
        return Patches(_unscaled(picture, images), rows // merged, columns // merged)
    if config.model_type == "llava" and pixels.ndim == 4:
        rows, columns = (side // vision.patch_size for side in pixels.shape[-2:])
        # One more is a tower's token for all of it. "default" leaves out the first, whichever that is.
        if tokens - rows * columns in (-1, 0, 1):
            return Patches(_unscaled(pixels[0], images), rows, columns, tokens - rows * columns)
    raise UsageError(
        f"{config.model_type}: where its {tokens} visual tokens stand on the picture is not known",
        hint="give a model whose tokens are one grid: LLaVA-1.5, Qwen2-VL, Qwen2.5-VL, Qwen3-VL",
    )


def _sides(rows: int, columns: int, patch: int) -> tuple[int, int]:
    return rows * patch, columns * patch


def _unscaled(pixels: Tensor, processor: Any) -> Tensor:
    """Return what a processor made of pixels [3, height, width] as pixels again, uint8."""
    if processor.do_normalize:
        mean, std = (torch.tensor(one)[:, None, None] for one in (processor.image_mean, processor.image_std))
        pixels = pixels * std + mean
    if processor.do_rescale:
        pixels = pixels / processor.rescale_factor
    return pixels.round().clamp(0, 255).to(torch.uint8)
