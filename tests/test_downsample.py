"""Images that are made smaller before the vision tower: exact, counted, or refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from structprune.errors import UsageError
from structprune.pruners.token._family import TokenPruner
from structprune.runtime.attach import paused
from structprune.runtime.flops import image_tokens, tower_counts, tower_operations
from structprune.runtime.tower import grid_places
from tests.oracle import pictures, pruned, token_pruner, worst
from tests.pictures import CLIP, IMAGE, TEXT, vision_model


def _pruner(tokens: int = 4, **fields: Any) -> TokenPruner:
    return token_pruner("downsample", target={"tokens": tokens}, **fields)


@torch.no_grad()
def _plain(batch: dict[str, Tensor], side: int) -> Tensor:
    """Return the logits of a plain model whose processor makes images of so many patches each way."""
    model: Any = vision_model("llava")
    pixels = nn.functional.interpolate(batch["pixel_values"], (8 * side,) * 2, mode="bicubic", antialias=True)
    features = model.model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True)
    ids = batch["input_ids"][0]
    visual = ids.eq(IMAGE)
    # Of 16 placeholders the first few.
    ids = ids[~visual | (visual.cumsum(0) <= side**2)]
    states = model.get_input_embeddings()(ids[None])
    states[0, ids.eq(IMAGE)] = torch.cat(features.pooler_output)
    logits: Tensor = model(inputs_embeds=states).logits
    return logits


@pytest.mark.parametrize("side", [1, 2, 3])
def test_it_is_the_plain_model_behind_a_processor_of_a_lower_resolution(side: int) -> None:
    model, batch = vision_model("llava"), pictures("llava", 1).batch()
    with pruned(model, _pruner(side**2, positions=None), batch), torch.no_grad():
        found = model(**batch).logits
        with paused(model):
            dense = model(**batch).logits
    text = int(batch["input_ids"][0].ne(IMAGE).flip(0).int().argmin())
    assert worst(found[:, -text:], _plain(batch, side)[:, -text:]) < 1e-6
    with torch.no_grad():
        assert torch.equal(vision_model("llava")(**batch).logits, dense)


@pytest.mark.parametrize("method", ["divprune", "downsample", "fastv", "grid_tokens", "random_tokens"])
def test_of_an_image_that_ends_the_prompt_the_last_token_may_be_the_one_that_is_left(method: str) -> None:
    model, batch = vision_model("llava"), pictures("llava", 1).batch()
    end = int(batch["input_ids"][0].eq(IMAGE).nonzero().max()) + 1
    batch |= {name: batch[name][:, :end] for name in ("input_ids", "attention_mask")}
    words = int(batch["input_ids"].ne(IMAGE).sum())
    with pruned(model, token_pruner(method, target={"tokens": 1}), batch), torch.no_grad():
        rows = model(**batch, use_cache=True).past_key_values.layers[-1].keys.shape[-2]
    assert rows == words + 1


def test_features_stand_at_the_last_patch_of_their_region() -> None:
    assert grid_places(2, 4).tolist() == [5, 7, 13, 15]
    assert grid_places(3, 4).tolist() == [0, 1, 3, 4, 5, 7, 12, 13, 15]
    assert grid_places(12, 12).tolist() == [*range(144)]


@pytest.mark.parametrize(
    ("target", "left"),
    [
        ({"tokens": 7}, 9),
        ({"tokens": 6}, 4),
        ({"tokens": 15}, 16),
        ({"keep_ratio": 0.3}, 4),
        ({"avg_tokens": 2}, 1),
        ({"visual_flops": 0.5}, 9),
    ],
)
def test_what_is_left_is_the_nearest_square(target: dict[str, Any], left: int) -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    pruner = token_pruner("downsample", target=target)
    plan = pruner.calibrate(model, [])
    assert plan.facts["tokens"] == left and pruner.forecast(model).reachable == 4 * (16 - left)
    with torch.no_grad():
        dense = model(**batch).logits
        with pruned(model, pruner, batch):
            assert torch.equal(model(**batch).logits, dense) == (left == 16)


def test_torch_counts_the_tower_as_the_plan_says() -> None:
    model, batch = vision_model("llava", attention="eager"), pictures("llava", 1).batch()
    plan = _pruner().calibrate(model, [])
    counted = []
    with pruned(model, _pruner(), batch):
        for _ in range(2):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(**batch)
            parts = counter.get_flop_counts()
            names = ("vision_tower", "multi_modal_projector")
            counted.append(sum(sum(parts[f"{type(model).__name__}.model.{one}"].values()) for one in names))
    few, all_patches = (
        tower_operations(model.config, tower_counts(model.config, count)) for count in (4, 16)
    )
    assert counted[0] / 2 == counted[1] / 2 == pytest.approx(few, rel=0.01)
    # 16 tokens cost 524288 in each of four blocks, 4 of them 124928.
    assert plan.facts["image_flops"] == (few + 4 * 124928) / (all_patches + 4 * 524288)
    of_others = token_pruner("grid_tokens", target={"tokens": 4}).calibrate(model, []).facts["image_flops"]
    assert of_others == (all_patches + 4 * 124928) / (all_patches + 4 * 524288)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_towers_of_many_sizes_are_refused(family: str) -> None:
    with pytest.raises(UsageError, match="cannot be made smaller") as caught:
        _pruner().forecast(vision_model(family))
    assert "processor" in caught.value.hint


def test_a_tower_without_a_class_token_is_made_smaller_too() -> None:
    vision = {name: value for name, value in CLIP.items() if name != "projection_dim"}
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
    )
    model, batch = LlavaForConditionalGeneration(config).eval(), pictures("llava", 1).batch()
    # "default" leaves out the first of all tokens, which is a patch here: no square is left.
    assert image_tokens(model.config) == 16
    with pruned(model, _pruner(), batch), torch.no_grad():
        layer = model(**batch, use_cache=True).past_key_values.layers[0]
    assert layer.get_seq_length() - layer.keys.shape[-2] == 12
    model.config.vision_feature_select_strategy = "default"
    assert image_tokens(model.config) == 15
    with pytest.raises(UsageError, match="cannot be made smaller"):
        _pruner().forecast(model)


def test_features_of_the_whole_image_are_refused() -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    whole: Any = model
    with torch.no_grad():
        features = whole.model.get_image_features(pixel_values=batch["pixel_values"])
        text = {name: value for name, value in batch.items() if name != "pixel_values"}
        with pruned(model, _pruner(), batch):
            with pytest.raises(UsageError, match="not those of a tower that it spares"):
                model(**text, mm_encoder_outputs={"image": features})
            with pytest.raises(UsageError, match="32 x 32 pixels"):
                model(**batch | {"pixel_values": batch["pixel_values"][..., :24]})
        with (
            pruned(model, token_pruner("grid_tokens"), batch),
            pruned(model, _pruner(), batch),
            pytest.raises(UsageError, match="no other method"),
        ):
            model(**batch)
        # What comes after it chooses among what it left.
        with pruned(model, _pruner(9), batch), pruned(model, token_pruner("fastv"), batch):
            assert bool(model(**batch).logits.isfinite().all())
