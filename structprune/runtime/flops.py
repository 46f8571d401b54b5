"""What visual tokens cost: operations of the language model's blocks, counted as token-pruning papers do.

Multiplications and additions as one, visual tokens alone: of n tokens through a block of width d and
feed-forward width m, 4 n d^2 + 2 n^2 d + 3 n d m, with grouped key-value heads counted as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

# Towers of which every image has the same size.
ONE_SIZE = ("clip", "siglip")


@dataclass(frozen=True)
class BlockCost:
    """Sizes of one block that tell what a token costs.

    Attributes:
        hidden: Width of the states.
        queries: Width of all query heads together.
        keys: Width of all key heads together.
        feed_forward: Width of the gated feed-forward.
    """

    hidden: int
    queries: int
    keys: int
    feed_forward: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "BlockCost":
        """Return the sizes of a language model's blocks."""
        text = config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads, groups = text.num_attention_heads, text.num_key_value_heads
        return cls(text.hidden_size, heads * size, groups * size, text.intermediate_size)

    def operations(self, entering: int, leaving: int | None = None) -> int:
        """Return the operations of a block.

        Args:
            entering: Tokens that its attention computes.
            leaving: Tokens that its feed-forward computes; as many unless given.
        """
        leaving = entering if leaving is None else leaving
        projections = entering * self.hidden * (2 * self.queries + 2 * self.keys)
        attention = 2 * entering * entering * self.queries
        return projections + attention + 3 * leaving * self.hidden * self.feed_forward


def visual_operations(cost: BlockCost, counts: Sequence[tuple[int, int]]) -> int:
    """Return the operations that the visual tokens of an image cost in all blocks.

    Args:
        cost: Sizes of a block.
        counts: Of every block the tokens that its attention and its feed-forward compute.
    """
    return sum(cost.operations(*pair) for pair in counts)


def tower_operations(config: PreTrainedConfig, counts: Sequence[tuple[int, int]]) -> int:
    """Return the operations of a LLaVA's vision tower and projector.

    Args:
        config: The model's, one whose `image_tokens` are known.
        counts: Of every layer the patches that its attention and its feed-forward compute.
    """
    vision, wide = config.vision_config, config.get_text_config().hidden_size
    width, more = vision.hidden_size, _class_tokens(vision)
    found = counts[0][0] * vision.num_channels * vision.patch_size**2 * width
    for entering, leaving in counts:
        found += 4 * (entering + more) * width**2 + 2 * (entering + more) ** 2 * width
        found += 2 * (leaving + more) * width * vision.intermediate_size
    layers = config.vision_feature_layer
    read = width * (1 if isinstance(layers, int) else len(layers))
    return int(found + counts[-1][1] * wide * (read + wide))


def tower_counts(config: PreTrainedConfig, patches: int) -> list[tuple[int, int]]:
    """Return of every layer of a LLaVA's vision tower that it computes so many patches."""
    return [(patches, patches)] * config.vision_config.num_hidden_layers


def rows_operations(config: PreTrainedConfig, tokens: int, layers: int) -> int:
    """Return the operations of all rows of attention, of an image, in some layers of a tower, computed anew.

    Args:
        config: The model's.
        tokens: Those of the image.
        layers: In how many layers.
    """
    vision = config.vision_config
    width = vision.hidden_size
    patches = tokens * getattr(vision, "spatial_merge_size", 1) ** 2 + _class_tokens(vision)
    # Queries and keys are projected once more, and multiplied.
    return int(layers * (2 * patches * width**2 + patches**2 * width))


def image_tokens(config: PreTrainedConfig) -> int | None:
    """Return how many visual tokens every image has; None where that depends on the image."""
    if config.model_type != "llava" or not str(config.vision_config.model_type).startswith(ONE_SIZE):
        return None
    vision = config.vision_config
    found: int = (vision.image_size // vision.patch_size) ** 2
    # "default" is all but the first, whichever that is.
    return found + _class_tokens(vision) - int(config.vision_feature_select_strategy == "default")


def _class_tokens(vision: PreTrainedConfig) -> int:
    return int(str(vision.model_type).startswith("clip"))
