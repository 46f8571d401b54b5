"""Tiny vision-language models with enough visual tokens to drop some, and batches of unequal rows."""

import copy
from functools import cache

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests.tiny import VOCABULARY, randomise

IMAGE, VIDEO, START, END = VOCABULARY - 1, VOCABULARY - 2, VOCABULARY - 3, VOCABULARY - 4
BLOCKS = 4
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    # The last one makes no features: four that do can merge 16 patches into one.
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
}
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
FAMILIES = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"]


def vision_model(family: str, *, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """Return a random model of a family, in eval mode, float32."""
    model, drawn = _drawn(family, attention, seed)
    torch.set_rng_state(drawn)
    # A copy is made in a third of the time.
    return copy.deepcopy(model)


@cache
def _drawn(family: str, attention: str, seed: int) -> tuple[PreTrainedModel, Tensor]:
    """Return a model, and the state in which building it leaves the generator of random numbers."""
    torch.manual_seed(seed)
    match family:
        case "llava":
            model: PreTrainedModel = LlavaForConditionalGeneration(
                LlavaConfig(
                    vision_config=CLIPVisionConfig(**CLIP),
                    text_config=LlamaConfig(**TEXT),
                    image_token_index=IMAGE,
                    tie_word_embeddings=False,
                )
            )
        case "llava_next":
            model = LlavaNextForConditionalGeneration(
                LlavaNextConfig(
                    vision_config=CLIPVisionConfig(**CLIP),
                    text_config=LlamaConfig(**TEXT),
                    image_token_index=IMAGE,
                    image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
                    tie_word_embeddings=False,
                )
            )
        case "qwen2_5_vl":
            model = Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(
                    text_config=TEXT | {"rope_parameters": AXES},
                    vision_config={
                        "depth": 2,
                        "hidden_size": 32,
                        "intermediate_size": 48,
                        "num_heads": 2,
                        "out_hidden_size": 64,
                        "patch_size": 8,
                        "window_size": 32,
                        "fullatt_block_indexes": [1],
                    },
                    tie_word_embeddings=False,
                    **IDS,
                )
            )
        case _:
            model = Qwen3VLForConditionalGeneration(
                Qwen3VLConfig(
                    text_config=TEXT
                    | {"head_dim": 16, "rope_parameters": AXES | {"mrope_interleaved": True}},
                    vision_config={
                        "depth": 3,
                        "hidden_size": 32,
                        "intermediate_size": 48,
                        "num_heads": 2,
                        "out_hidden_size": 64,
                        "patch_size": 8,
                        "num_position_embeddings": 64,
                        "deepstack_visual_indexes": [0, 1],
                    },
                    tie_word_embeddings=False,
                    **IDS,
                )
            )
    randomise(model, seed)
    model.set_attn_implementation(attention)
    return model.eval(), torch.get_rng_state()


class Pictures:
    """Prompts with pictures for one family; every prompt can be run alone or in a left-padded batch.

    Args:
        family: Which model reads them.
        counts: How many pictures each prompt has.
        seed: Draws pictures and words.
    """

    def __init__(self, family: str, counts: tuple[int, ...] = (2, 1, 0), seed: int = 0) -> None:
        self.family = family
        self.draw = torch.Generator().manual_seed(seed)
        self.sides = [(64, 32), (64, 64), (32, 64)]
        self.rows: list[list[int]] = []
        self.pictures: list[list[dict[str, Tensor]]] = []
        number = 0
        for row, count in enumerate(counts):
            ids, found = [1, *self._words(2)], []
            for _ in range(count):
                tokens, picture = self._picture(number)
                ids += [*self._words(1), *tokens, *self._words(2)]
                found.append(picture)
                number += 1
            self.rows.append([*ids, *self._words(3 + 4 * row)])
            self.pictures.append(found)

    def _words(self, count: int) -> list[int]:
        found: list[int] = torch.randint(3, END - 1, (count,), generator=self.draw).tolist()
        return found

    def _picture(self, number: int) -> tuple[list[int], dict[str, Tensor]]:
        if self.family == "llava":
            return [IMAGE] * 16, {"pixel_values": torch.randn(1, 3, 32, 32, generator=self.draw)}
        height, width = self.sides[number % 3]
        if self.family == "llava_next":
            tiles = (height // 32) * (width // 32)
            pixels = torch.zeros(1, 5, 3, 32, 32)
            pixels[:, : tiles + 1] = torch.randn(1, tiles + 1, 3, 32, 32, generator=self.draw)
            # The whole picture, then its tiles with a token at the end of every line.
            tokens = 16 + (height // 8) * (width // 8 + 1)
            return [IMAGE] * tokens, {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
        patch, rows, columns = 8, height // 8, width // 8
        pixels = torch.randn(rows * columns, 3 * 2 * patch * patch, generator=self.draw)
        grid = torch.tensor([[1, rows, columns]])
        return [START, *[IMAGE] * (rows * columns // 4), END], {
            "pixel_values": pixels,
            "image_grid_thw": grid,
        }

    def _inputs(self, rows: list[int], width: int) -> dict[str, Tensor]:
        ids = torch.tensor([[0] * (width - len(self.rows[row])) + self.rows[row] for row in rows])
        mask = torch.tensor([[0] * (width - len(self.rows[row])) + [1] * len(self.rows[row]) for row in rows])
        found = {"input_ids": ids, "attention_mask": mask}
        pictures = [picture for row in rows for picture in self.pictures[row]]
        for name in pictures[0] if pictures else ():
            found[name] = torch.cat([picture[name] for picture in pictures])
        if self.family.startswith("qwen"):
            found["mm_token_type_ids"] = (ids == IMAGE).int()
        return found

    def batch(self) -> dict[str, Tensor]:
        """Return all prompts, padded on the left."""
        return self._inputs([*range(len(self.rows))], max(map(len, self.rows)))

    def alone(self, row: int) -> dict[str, Tensor]:
        """Return one prompt."""
        return self._inputs([row], len(self.rows[row]))
