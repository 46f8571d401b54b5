"""A tiny LLaVA with a processor, and questions on images in a folder, for tests of what sees."""

import json
from pathlib import Path

import torch
from transformers import CLIPImageProcessorPil, LlavaProcessor

from tests.tiny import VISION, VOCABULARY, save_tiny, tokenizer

ROWS = [
    {"image": "images/one.png", "question": "What is it?", "answer": "a", "kind": "what"},
    {"image": "images/two.png", "question": "Is there a dog in it?", "answer": "b", "kind": "presence"},
    {"image": "images/one.png", "question": "Why?", "answer": "a", "kind": "what"},
]


def save_seeing(
    folder: Path, *, patch_size: int = VISION["patch_size"], depth: int = 2, **options: object
) -> Path:
    """Save a tiny LLaVA with a tokenizer that knows its image token, and a processor; return the folder."""
    return save_processor(save_tiny("llava", folder, depth=depth), patch_size=patch_size, **options)


def save_processor(folder: Path, *, patch_size: int = VISION["patch_size"], **options: object) -> Path:
    """Save beside a tiny LLaVA a processor, and a tokenizer that knows its image token; return the folder."""
    words = tokenizer()
    # The model's image token is the last of its vocabulary, behind unused ones.
    words.add_tokens([f"<unused{number}>" for number in range(VOCABULARY - 1 - len(words))])
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side = VISION["image_size"]
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    LlavaProcessor(
        images,
        words,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        **options,
    ).save_pretrained(folder)
    return folder


def save_rows(folder: Path, rows: list[dict[str, object]] | None = None, name: str = "asked.jsonl") -> Path:
    """Save questions and two images of other sizes than the model's; return the file."""
    from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    pixels = torch.arange(24 * 20 * 3).remainder(251).to(torch.uint8).view(24, 20, 3)
    Image.fromarray(pixels.numpy()).save(folder / "images/one.png")
    Image.fromarray(255 - pixels.numpy()).save(folder / "images/two.png")
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows)))
    return folder / name
