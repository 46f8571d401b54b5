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
        `input_ids` [1, tokens], `pixel_values`, and what else tells the model of its size.
    """
    vision = getattr(config, "vision_config", None)
    token = getattr(config, "image_token_id", None)
    if vision is None or token is None:
        return None
    one_size = isinstance(getattr(vision, "image_size", None), int)
    if hasattr(vision, "spatial_merge_size") and hasattr(vision, "temporal_patch_size"):
        seen = _any_size(vision)
    elif config.model_type == "llava" and one_size:
        seen = _one_size(vision, config)
    elif config.model_type == "llava_next" and one_size:
        seen = _tiled(vision, config)
    else:
        return None
    if "tokens" not in seen:
        return None
    count = int(seen.pop("tokens"))
    half = len(text) // 2
    ids = torch.cat([text[:half], torch.full((count,), token), text[half:]])
    if "image_grid_thw" in seen:
        # Without it positions would not say where in the image a token is, or the model would refuse.
        seen["mm_token_type_ids"] = (ids == token).int()[None]
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


def _tiled(vision: PreTrainedConfig, config: PreTrainedConfig) -> Batch:
    """Return an image of the smallest size that is cut into tiles, and how many tokens it becomes.

    The image as a whole is one more tile, and every line of the others ends with a token of its own.
    """
    side, patches = vision.image_size, vision.image_size // vision.patch_size
    height, width = min(config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
    if height % side or width % side or config.vision_feature_select_strategy != "default":
        return {}
    rows, columns = height // side, width // side
    lines = rows * patches * (columns * patches + 1)
    return {
        "pixel_values": _pixels((1, 1 + rows * columns, vision.num_channels, side, side)),
        "image_sizes": torch.tensor([[height, width]]),
        "tokens": torch.tensor(patches * patches + lines),
    }


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
