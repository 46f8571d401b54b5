"""ToMe: what is merged inside the vision tower, what its attention makes of that, and what is refused."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from structprune.errors import QualityError, UsageError
from structprune.pruners.token._family import TokenPruner
from structprune.runtime.attach import engine_of
from structprune.runtime.flops import tower_counts, tower_operations
from structprune.runtime.tower_merge import MergedPatches, MergingCall
from structprune.solvers.bipartite import least_left, match, merge_counts
from tests.oracle import pictures, pruned, token_pruner, worst
from tests.pictures import CLIP, IMAGE, TEXT, vision_model


def _pruner(**fields: Any) -> TokenPruner:
    return token_pruner("tome", **fields)


def _merging(counts: list[int], *, patches: int = 16, class_token: bool = False) -> MergingCall:
    return MergingCall(MergedPatches(counts, match, patches, True), {}, class_token)


@pytest.mark.parametrize("class_token", [False, True])
def test_sizes_and_weighted_sums_stay(class_token: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    call = _merging([300, 150, 80, 41], patches=576, class_token=class_token)
    states = torch.randn(2, 576 + class_token, 24, generator=draw)
    whole, first = states.double().sum(1), states[:, 0]
    for layer in range(4):
        call.note_keys(torch.randn(2, states.shape[1], 8, generator=draw))
        merged = call.merged(layer, states)
        assert merged is not None and call.sizes is not None and call.places is not None
        states = merged
        assert torch.equal(call.sizes.sum(1), torch.full((2,), 576.0 + class_token))
        sums = (states * call.sizes[..., None]).double().sum(1)
        assert float((sums - whole).abs().max()) < 3e-5
        assert bool((call.places.diff(dim=1) > 0).all())
    assert states.shape[1] == 41 + class_token and int(call.filled.sum()) == 2 * states.shape[1]
    if class_token:
        assert torch.equal(states[:, 0], first) and bool((call.sizes[:, 0] == 1).all())


def test_what_is_merged_stands_at_its_first_patch() -> None:
    keys = torch.eye(6)[None].clone()
    keys[0, 4], keys[0, 2] = keys[0, 1], keys[0, 5]
    call = _merging([4], patches=6)
    call.note_keys(keys)
    states = torch.arange(6.0)[None, :, None]
    # 4 goes into 1, and 2 into 5, which stands at 2 from then on.
    assert match(keys, 2, 0).tolist() == [[0, 1, 5, 3, 1, 5]]
    merged = call.merged(0, states)
    assert merged is not None and merged.flatten().tolist() == [0, 2.5, 3.5, 3]
    assert call.places is not None and call.places.tolist() == [[0, 1, 2, 3]]


def test_duplicates_are_merged_first_and_a_class_token_never() -> None:
    draw = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 17, 8, generator=draw)
    keys[0, 6], keys[0, 10] = keys[0, 3], 2 * keys[0, 9]
    keys[0, 0] = keys[0, 1]
    into = match(keys, 2, 1)[0]
    assert [(a, int(b)) for a, b in enumerate(into) if a != b] == [(6, 3), (10, 9)]
    assert int(match(keys, 8, 1)[0, 0]) == 0
    # Of equal pairs the first.
    assert match(torch.ones(1, 6, 4), 2, 0).tolist() == [[1, 1, 1, 3, 4, 5]]


@pytest.mark.parametrize(
    ("size", "left", "layers", "counts"),
    [
        (576, 208, 23, [*range(560, 207, -16)]),  # the paper's 16 in each layer
        (16, 1, 4, [8, 4, 2, 1]),
        (144, 18, 3, [72, 36, 18]),
        (144, 36, 3, [108, 72, 36]),
        (16, 16, 4, [16] * 4),
    ],
)
def test_layers_merge_about_as_many_but_never_more_than_half(
    size: int, left: int, layers: int, counts: list[int]
) -> None:
    assert merge_counts(size, left, layers) == counts


def test_every_count_down_to_the_least_is_met() -> None:
    for size, layers in ((576, 23), (145, 4), (16, 3)):
        for left in range(least_left(size, layers), size + 1):
            counts = [size, *merge_counts(size, left, layers)]
            assert counts[-1] == left and len(counts) == layers + 1
            assert all(2 * after >= now >= after for now, after in pairwise(counts))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_a_merged_duplicate_counts_in_attention_as_often_as_it_stands(kernel: str) -> None:
    model: Any = vision_model("llava", attention=kernel)
    attention = model.model.vision_tower.encoder.layers[0].self_attn
    states = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(2))
    states[0, 6], states[0, 8], states[0, 2] = states[0, 3], states[0, 3], states[0, 11]
    call = _merging([9], patches=12)
    with torch.no_grad():
        call.note_keys(attention.k_proj(states).unflatten(-1, (2, -1)).mean(2))
        merged = call.merged(0, states)
        assert merged is not None and call.places is not None
        whole = attention(hidden_states=states)[0][0, call.places[0]]
        found = attention(hidden_states=merged, attention_mask=call.mask(merged))[0][0]
        plain = attention(hidden_states=merged)[0][0]
    assert worst(found, whole) < 1e-6 < 1e-3 < worst(plain, whole)


@torch.no_grad()
def _features(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    names = ("pixel_values", "image_sizes")
    found = model.model.get_image_features(**{name: batch[name] for name in names if name in batch})
    return list(found.pooler_output)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_tower_is_as_by_hand(kernel: str) -> None:
    model, batch = vision_model("llava", attention=kernel), pictures("llava", 2).batch()
    tower: Any = model.model.vision_tower
    counts = merge_counts(16, 3, 4)
    call = _merging(counts, class_token=True)
    with torch.no_grad():
        states = tower.pre_layrnorm(tower.embeddings(batch["pixel_values"]))
        for number, layer in enumerate(tower.encoder.layers[:4]):
            read = layer.layer_norm1(states)
            states = states + layer.self_attn(hidden_states=read, attention_mask=call.mask(states))[0]
            call.note_keys(layer.self_attn.k_proj(read).unflatten(-1, (2, -1)).mean(2))
            merged = call.merged(number, states)
            states = states if merged is None else merged
            states = states + layer.mlp(layer.layer_norm2(states))
        expected = model.model.multi_modal_projector(states[:, 1:])
    with pruned(model, _pruner(target={"tokens": 3}), batch):
        for number, features in enumerate(_features(model, batch)):
            there = features.any(-1).nonzero().flatten()
            assert call.places is not None
            assert torch.equal(there, call.places[number, 1:] - 1)
            assert worst(features[there], expected[number]) < 1e-6


def test_every_tile_of_llava_next_is_merged_alone() -> None:
    model, batch = vision_model("llava_next"), pictures("llava_next", 2).batch()
    dense = _features(model, batch)
    newline = model.model.image_newline
    with pruned(model, _pruner(target={"keep_ratio": 0.25}), batch), torch.no_grad():
        found = _features(model, batch)
        layer = model(**batch, use_cache=True).past_key_values.layers[0]
    tiles = 0
    for few, whole in zip(found, dense, strict=True):
        lines = (whole == newline).all(-1)
        assert torch.equal((few == newline).all(-1), lines)
        # Pictures fill their tiles: four features are left of each, the whole picture's first.
        there = few.any(-1) & ~lines
        assert int(there[:16].sum()) == 4 and int(there.sum()) == 4 * int((~lines).sum()) // 16
        tiles += int(there.sum())
    words = int(batch["input_ids"].ne(IMAGE).sum())
    assert layer.keys.shape[-2] == words + tiles


def test_torch_counts_the_tower_as_the_plan_says() -> None:
    model, batch = vision_model("llava", attention="eager"), pictures("llava", 1).batch()
    pruner = _pruner(target={"tokens": 3})
    plan, config = pruner.calibrate(model, []), model.config
    seen = pruner.seen_by_tower(config, 16, 3)
    assert seen == [(16, 13), (13, 10), (10, 6), (6, 3), (3, 3)]
    with pruned(model, pruner, batch), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch)
    parts = counter.get_flop_counts()
    names = ("vision_tower", "multi_modal_projector")
    counted = sum(sum(parts[f"{type(model).__name__}.model.{one}"].values()) for one in names) / 2
    choosing = pruner.chosen_in_tower(config, 16, 3)
    # Cosines of keys of 16: of 9 and 8 tokens, then 7 and 7, 6 and 5, 4 and 3.
    assert choosing == 16 * (72 + 49 + 30 + 12)
    assert counted == pytest.approx(tower_operations(config, seen) + choosing, rel=0.01)
    whole = tower_operations(config, tower_counts(config, 16))
    cost = plan.facts["image_flops"] * (whole + 4 * 524288)
    assert cost == pytest.approx(tower_operations(config, seen) + 4 * (30720 * 3 + 128 * 9))


def test_a_tower_without_a_class_token_merges_too() -> None:
    vision = {name: value for name, value in CLIP.items() if name != "projection_dim"}
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
    )
    model, batch = LlavaForConditionalGeneration(config).eval(), pictures("llava", 1).batch()
    with pruned(model, _pruner(target={"tokens": 3}), batch):
        (features,) = _features(model, batch)
    assert int(features.any(-1).sum()) == 3
    model.config.vision_feature_select_strategy = "default"
    with pytest.raises(UsageError, match="vision_feature_select_strategy"):
        _pruner().forecast(model)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_towers_that_merge_by_place_are_refused(family: str) -> None:
    with pytest.raises(UsageError, match="cannot be merged inside its vision tower") as caught:
        _pruner().forecast(vision_model(family))
    assert "divprune" in caught.value.hint


def test_kernels_that_add_nothing_to_scores_are_refused() -> None:
    model = vision_model("llava")
    model.config.vision_config._attn_implementation = "flash_attention_2"
    with pytest.raises(UsageError, match="'flash_attention_2'") as caught:
        _pruner().forecast(model)
    assert "sdpa" in caught.value.hint and "proportional" in caught.value.hint
    _pruner(proportional=False).forecast(model)


def test_features_of_several_layers_are_refused() -> None:
    model = vision_model("llava")
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(UsageError, match=r"vision_feature_layer: \[-2, -1\]"):
        _pruner().forecast(model)


def test_fewer_than_halving_can_leave_are_refused() -> None:
    model: Any = vision_model("llava")
    model.config.vision_feature_layer = 2
    with pytest.raises(UsageError, match="can leave 4") as caught:
        _pruner(target={"tokens": 3}).forecast(model)
    assert caught.value.hint == "tokens can be from 4 to 16"
    _pruner(target={"tokens": 4}).forecast(model)


def test_a_picture_that_is_no_number_stops_the_run() -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    with pruned(model, _pruner(), batch), torch.no_grad():
        expected = model(**batch).logits
        broken = batch["pixel_values"].clone()
        broken[1] = torch.nan
        with pytest.raises(QualityError, match="tome"):
            model(**batch | {"pixel_values": broken})
        assert torch.equal(model(**batch).logits, expected)
    assert engine_of(model) is None
    assert not any(module._forward_hooks for module in _parts(model, "layer_norm2"))


def _parts(model: nn.Module, name: str) -> list[nn.Module]:
    return [one for path, one in model.named_modules() if path.endswith(name)]


def test_features_made_without_it_are_refused() -> None:
    model, batch = vision_model("llava"), pictures("llava", 1).batch()
    features = model.model.get_image_features(pixel_values=batch["pixel_values"])
    text = {name: value for name, value in batch.items() if name != "pixel_values"}
    with pruned(model, _pruner(), batch), pytest.raises(UsageError, match="tome: the features") as caught:
        model(**text, mm_encoder_outputs={"image": features})
    assert "no other method" in caught.value.hint
