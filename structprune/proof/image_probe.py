"""An image that every reload of a vision-language model sees: made from the configuration alone."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from structprune.models.streamed import Batch

# A grid of so many merged patches each way, where a model takes images of any size.
GRID = 2


def image_probe(config: PreTrainedConfig, text: Tensor) -> Batch | None:
    """Return one prompt with one image, as a model's processor would make it; None where we cannot.

    Args:
        config: The model's.
        text: Token ids without a meaning of their own, shape [tokens]; half of them stand before the image.

    Returns:
        `input_ids` [1, tokens], `pixel_values`, and `image_grid_thw` where the model reads it.
    """
    vision = getattr(config, "vision_config", None)
    token = getattr(config, "image_token_id", None)
    if vision is None or token is None:
        return None
    if hasattr(vision, "spatial_merge_size") and hasattr(vision, "temporal_patch_size"):
        seen = _any_size(vision)
    elif config.model_type == "llava" and isinstance(getattr(vision, "image_size", None), int):
        seen = _one_size(vision, config)
    else:
        return None
    count = int(seen.pop("tokens"))
    half = len(text) // 2
    ids = torch.cat([text[:half], torch.full((count,), token), text[half:]])
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if limit is not None and len(ids) > limit else {"input_ids": ids[None], **seen}


def _one_size(vision: PreTrainedConfig, config: PreTrainedConfig) -> Batch:
    """Return the pixels of a tower that takes one size, and how many tokens they become."""
    side = vision.image_size // vision.patch_size
    # A CLIP tower adds a class token; "default" is all but the first, whichever that is.
    whole = getattr(config, "vision_feature_select_strategy", "default") == "full"
    more = str(vision.model_type).startswith("clip") + whole - 1
    shape = (1, vision.num_channels, vision.image_size, vision.image_size)
    return {"pixel_values": _pixels(shape), "tokens": torch.tensor(side * side + more)}


def _any_size(vision: PreTrainedConfig) -> Batch:
    """Return the patches of a tower that takes any size, and how many tokens they become."""
    side = GRID * vision.spatial_merge_size
    channels = getattr(vision, "in_channels", getattr(vision, "in_chans", 3))
    width = channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "pixel_values": _pixels((side * side, width)),
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "tokens": torch.tensor(GRID * GRID),
    }


def _pixels(shape: tuple[int, ...]) -> Tensor:
    count = int(torch.tensor(shape).prod())
    return torch.arange(count).sin().view(shape)
