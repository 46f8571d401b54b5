"""A random LLaVA of 300 M parameters and a prompt with one image, for what running it takes."""

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

SIDE, PATCH, TEXT = 336, 14, 64
BLOCKS, HIDDEN = 22, 1024
VOCABULARY = 4096
IMAGE = VOCABULARY - 1


def random_llava(side: int = SIDE, width: int = 64, layers: int = 1) -> LlavaForConditionalGeneration:
    """Return a LLaVA with random weights.

    Args:
        side: Pixels of an image each way.
        width: Of the vision tower; small, where that is not what is measured.
        layers: Of the vision tower.
    """
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        image_size=side,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 11 // 4,
        num_hidden_layers=BLOCKS,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=4096,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, tie_word_embeddings=False
    )
    return LlavaForConditionalGeneration(config).eval()


def prompt(side: int = SIDE) -> dict[str, Tensor]:
    """Return half of the text, an image of so many pixels each way, the other half."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(10, VOCABULARY - 1, (1, TEXT), generator=generator)
    image = torch.full((1, (side // PATCH) ** 2), IMAGE)
    ids = torch.cat([words[:, : TEXT // 2], image, words[:, TEXT // 2 :]], 1)
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, side, side, generator=generator)}
