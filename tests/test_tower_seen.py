"""What methods see of the vision tower is what an eager one computes, on the tokens that are made of it."""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)

from structprune.errors import UsageError
from structprune.pruners.token._scored import ScoredTokens
from structprune.runtime.attach import attach, detach, paused
from structprune.runtime.drop import Drop
from structprune.runtime.flops import BlockCost, rows_operations
from structprune.runtime.tower_seen import tower_attentions
from structprune.runtime.view import View
from tests.oracle import TOKEN_METHODS, generate, pictures, token_pruner
from tests.pictures import CLIP, FAMILIES, IMAGE, Pictures, vision_model
from tests.tiny import randomise

EXACT = 1e-6


class Probe(ScoredTokens):
    """Keeps the tokens that receive most in the tower, and remembers what it could see."""

    tower_layers = (-2, -1, 0.5)
    newlines: Literal["protect", "compete"] = "compete"

    def score(self, seen: View) -> Tensor:
        last = seen.tower(-1)
        FOUND.append(
            {
                "first": seen.tower(-2).received,
                "attention": last.attention,
                "received": last.received,
                "keys": last.keys,
                "places": seen.places,
                "real": seen.real,
                "middle": seen.tower(0.5).received,
            }
        )
        return last.received


FOUND: list[dict[str, Tensor]] = []


@contextmanager
def probed(model: PreTrainedModel, *, block: int = 0, tokens: int = 5) -> Iterator[list[dict[str, Tensor]]]:
    FOUND.clear()
    attach(model, "probe", [Drop(block, False, torch.tensor(tokens), Probe())])
    try:
        yield FOUND
    finally:
        detach(model)


def siglip_model(attention: str = "sdpa") -> PreTrainedModel:
    """Return a LLaVA whose tower has no class token."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(**{name: value for name, value in CLIP.items() if name != "projection_dim"})
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=vision_model("llava").config.text_config,
            image_token_index=IMAGE,
            vision_feature_select_strategy="full",
            tie_word_embeddings=False,
        )
    )
    randomise(model, 0)
    model.set_attn_implementation(attention)
    return model.eval()


@torch.no_grad()
def eager_tower(
    model: PreTrainedModel, batch: dict[str, Tensor], layer: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return probabilities [heads, patches, patches] and unrotated keys [patches, size] of every square.

    Both as the tower's own eager kernel gets them: of Qwen's, one segment after another.
    """
    rows: list[Tensor] = []
    states: list[Tensor] = []
    attention: Any = tower_attentions(model.base_model)[layer]
    note = attention.register_forward_pre_hook(
        lambda _, args, kwargs: states.append(kwargs.get("hidden_states", args[0] if args else None)),
        with_kwargs=True,
    )
    softmax = torch.nn.functional.softmax
    inside = [False]
    begin = attention.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
    end = attention.register_forward_hook(lambda *_: inside.__setitem__(0, False))

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        found = softmax(*args, **kwargs)
        if inside[0]:
            rows.extend(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", spy)
        model(**batch)
    for one in (note, begin, end):
        one.remove()
    if hasattr(attention, "qkv"):
        keys = attention.qkv(states[0]).view(len(states[0]), 3, attention.num_heads, -1)[:, 1].mean(1)
        return rows, [*keys.split([one.shape[-1] for one in rows])]
    keys = attention.k_proj(states[0])
    return rows, [*keys.view(*keys.shape[:2], -1, attention.head_dim).mean(2)]


def model_of(family: str, attention: str = "sdpa") -> PreTrainedModel:
    return siglip_model(attention) if family == "siglip" else vision_model(family, attention=attention)


class Uneven(Pictures):
    """Prompts with pictures of 3 x 2 and 2 x 3 tokens, in which windows of 2 x 2 differ in size."""

    def _picture(self, number: int) -> tuple[list[int], dict[str, Tensor]]:
        self.sides = [(48, 32), (32, 48), (64, 64)]
        return super()._picture(number)


def prompts_of(family: str) -> Pictures:
    if family == "qwen2_5_vl":
        return Uneven(family)
    return pictures("llava" if family == "siglip" else family)


def windows(batch: dict[str, Tensor]) -> Iterator[tuple[list[Tensor], int]]:
    """Yield of every picture the tokens of each window, and how many patches it has."""
    for _, rows, columns in batch["image_grid_thw"].tolist():
        index = torch.arange(rows * columns // 4).view(rows // 2, columns // 2)
        starts = [(row, column) for row in range(0, rows // 2, 2) for column in range(0, columns // 2, 2)]
        yield [index[row : row + 2, column : column + 2].flatten() for row, column in starts], rows * columns


def spatial(family: str, values: list[Tensor], batch: dict[str, Tensor]) -> list[Tensor]:
    """Return values of patches, one tensor [patches, ...] a segment, as values of tokens, by hand."""
    if family == "siglip":
        return values
    if family == "llava":
        return [one[1:] for one in values]
    if family == "llava_next":
        found = []
        squares = [one[1:].view(4, 4, -1) for one in values]
        for height, width in batch["image_sizes"].tolist():
            whole, tiles = squares[0], squares[1 : 1 + (height // 32) * (width // 32)]
            del squares[: 1 + len(tiles)]
            across = width // 32
            lines = [torch.cat(tiles[start : start + across], 1) for start in range(0, len(tiles), across)]
            stitched = torch.cat(lines)
            ends = torch.zeros(len(stitched), 1, stitched.shape[-1])
            found.append(torch.cat([whole.flatten(0, 1), torch.cat([stitched, ends], 1).flatten(0, 1)]))
        return found
    merged = torch.cat(values).view(-1, 4, values[0].shape[-1]).mean(1)
    found = []
    for parts, patches in windows(batch):
        mine, merged = merged[: patches // 4], merged[patches // 4 :]
        if family == "qwen2_5_vl":
            # Windows stand one after another.
            mine = torch.empty_like(mine).index_copy(0, torch.cat(parts), mine)
        found.append(mine)
    return found


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*FAMILIES, "siglip"])
def test_what_is_seen_of_the_tower_is_what_an_eager_one_computes(family: str, kernel: str) -> None:
    batch = prompts_of(family).batch()
    model = model_of(family, kernel)
    with torch.no_grad(), probed(model) as found:
        model(**batch)
    (seen,) = found
    for layer, name in ((-1, "received"), (-2, "first")):
        rows, keys = eager_tower(model_of(family, "eager"), batch, layer)
        asking = torch.tensor([len(one[0]) for one in rows], dtype=torch.float32)
        if family == "qwen2_5_vl" and layer == -2:
            # Windows of four by four patches; the queries of other windows of the image pay nothing.
            assert [one.shape[-1] for one in rows] == [16, 8, 16, 8, 16, 16, 16, 16]
            asking = torch.tensor([patches for parts, patches in windows(batch) for _ in parts])
        means = [one.mean(0).sum(0)[:, None] / count for one, count in zip(rows, asking, strict=True)]
        _close(seen[name], [one[:, 0] for one in spatial(family, means, batch)], seen["real"])
        if layer == -1:
            _close(seen["keys"], spatial(family, keys, batch), seen["real"])
            first = [one.mean(0)[0][:, None] for one in rows]
            paid = first if family.startswith("llava") else means
            _close(seen["attention"], [one[:, 0] for one in spatial(family, paid, batch)], seen["real"])


def _close(found: Tensor, expected: list[Tensor], real: Tensor) -> None:
    assert found.dtype == torch.float32 and len(found) == len(expected) == 3
    assert float(expected[0].abs().max()) > 1e-3
    for mine, there, other in zip(found, real, expected, strict=True):
        assert int(there.sum()) == len(other)
        assert float((mine[there] - other).abs().max()) < EXACT
        assert not bool(mine[~there].any())


def test_a_share_of_the_depth_names_a_layer() -> None:
    model = vision_model("qwen3_vl")
    with torch.no_grad(), probed(model) as found:
        model(**pictures("qwen3_vl", 1).batch())
    # Half of three layers is the second one.
    assert torch.equal(found[0]["middle"], found[0]["first"])


def test_places_are_those_of_the_picture() -> None:
    for family in FAMILIES:
        model, prompts = vision_model(family), pictures(family, 2, 1)
        with torch.no_grad(), probed(model) as found:
            model(**prompts.batch())
        (seen,) = found
        for number, (places, real) in enumerate(zip(seen["places"], seen["real"], strict=True)):
            height, width = (32, 32) if family == "llava" else prompts.sides[number]
            side = 16 if family.startswith("qwen") else 8
            expected = [[0, row, column] for row in range(height // side) for column in range(width // side)]
            if family == "llava_next":
                expected = [[0, row, column] for row in range(4) for column in range(4)]
                across = [*range(width // 8), -1]
                expected += [[1, row, column] for row in range(height // 8) for column in across]
            assert places[real].tolist() == expected


def test_padding_of_a_tile_is_cut_off_as_the_model_does_it() -> None:
    # 20 x 32 pixels stand in a tile of 32 x 32 twice as large: lines above and below are not of the picture.
    model, batch = vision_model("llava_next"), pictures("llava_next", 1).batch()
    batch["image_sizes"] = torch.tensor([[20, 64]])
    with torch.no_grad():
        features = model.model.get_image_features(batch["pixel_values"], batch["image_sizes"]).pooler_output
    rows = (len(features[0]) - 16) // 9
    assert rows == 2 or rows < 4
    ids = batch["input_ids"][0].tolist()
    first = ids.index(IMAGE)
    ids = [*ids[:first], *[IMAGE] * len(features[0]), *(one for one in ids[first:] if one != IMAGE)]
    batch |= {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    with torch.no_grad(), probed(model) as found:
        model(**batch)
    places = found[0]["places"][0]
    assert places[16:].tolist() == [[1, row, column] for row in range(rows) for column in [*range(8), -1]]
    assert bool(found[0]["received"][0][places[:, 2] >= 0].gt(0).all())
    assert bool(found[0]["received"][0][places[:, 2] < 0].eq(0).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_shown_comes_along_when_generating_and_with_every_beam(family: str) -> None:
    model, batch = vision_model(family), pictures(family, 2, 1, 0).batch()
    with probed(model, block=2) as found, torch.no_grad():
        model(**batch)
        generate(model, batch)
        generate(model, batch, num_beams=2)
    plain, generated, beams = found
    for name, values in plain.items():
        assert torch.equal(generated[name], values)
        # Rows are repeated with all their pictures: two of the first, one of the second.
        assert torch.equal(beams[name], values[[0, 1, 0, 1, 2, 2]])


def test_every_token_is_seen_where_some_are_gone_already() -> None:
    model, batch = vision_model("llava"), pictures("llava", 1, 1).batch()
    FOUND.clear()
    attach(
        model, "probe", [Drop(block, False, torch.tensor(keep), Probe()) for block, keep in ((0, 9), (2, 4))]
    )
    with torch.no_grad():
        model(**batch)
    whole, after = FOUND
    for row in range(2):
        kept = whole["received"][row].argsort(descending=True, stable=True)[:9].sort().values
        for name in ("received", "keys", "places"):
            assert torch.equal(after[name][row], whole[name][row][kept])


def test_features_that_others_made_are_refused_by_a_method_that_looks_into_the_tower() -> None:
    model, batch = vision_model("llava"), pictures("llava", 1).batch()
    text = {name: one for name, one in batch.items() if name != "pixel_values"}
    with torch.no_grad():
        before = model.model.get_image_features(batch["pixel_values"])
        with probed(model) as found:
            with pytest.raises(UsageError, match="not made by the vision tower") as caught:
                model(**text, mm_encoder_outputs={"image": before})
            assert "pixel_values" in caught.value.hint
            with paused(model):
                blind = model.model.get_image_features(batch["pixel_values"])
            with pytest.raises(UsageError, match="was not looked at"):
                model(**text, mm_encoder_outputs={"image": blind})
            mine = model.model.get_image_features(batch["pixel_values"])
            found.clear()
            logits = model(**text, mm_encoder_outputs={"image": mine}).logits
            assert torch.equal(model(**batch).logits, logits)
            assert torch.equal(found[0]["keys"], found[1]["keys"])


def test_a_tower_that_fails_leaves_nothing_behind_and_threads_look_apart() -> None:
    model = vision_model("llava")
    batches = [pictures("llava", 2, 1).batch(), pictures("llava", 1).batch()]
    layer = tower_attentions(model.base_model)[-1]
    with probed(model) as found, torch.no_grad():
        expected = [model(**batch).logits for batch in batches]

        def fail(*_: object) -> None:
            raise ArithmeticError("in the middle of the tower")

        handle = layer.register_forward_hook(fail)
        with pytest.raises(ArithmeticError):
            model(**batches[0])
        handle.remove()
        assert torch.equal(model(**batches[0]).logits, expected[0])
        together = threading.Barrier(2, timeout=20)
        handle = layer.register_forward_hook(lambda *_: together.wait() * 0 or None)
        logits: dict[int, Tensor] = {}
        grad = torch.no_grad()

        def run(number: int) -> None:
            with grad.__class__():
                logits[number] = model(**batches[number]).logits

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        handle.remove()
        assert all(torch.equal(logits[number], expected[number]) for number in range(2))
        mine = copy.deepcopy(model)
        assert torch.equal(mine(**batches[0]).logits, expected[0])
        detach(mine)
    assert len(found) >= 6


def test_a_layer_that_a_tower_lacks_is_refused_before_anything_runs() -> None:
    class Deep(Probe):
        tower_layers = (-6,)

    with pytest.raises(UsageError, match="layer -6 of the vision tower: it has 5"):
        Deep().forecast(vision_model("llava"))
    Deep.tower_layers = (-3,)
    assert Deep().forecast(vision_model("qwen3_vl")).unit


@pytest.mark.parametrize("method", [one for one in TOKEN_METHODS if token_pruner(one).tower_layers])
def test_to_look_into_the_tower_costs_less_than_a_hundredth_of_a_dense_image(method: str) -> None:
    # LLaVA-1.5-7B, 64 of 576 tokens left.
    cost = BlockCost(4096, 4096, 4096, 11008)
    vision = CLIPVisionConfig(hidden_size=1024, num_attention_heads=16, num_hidden_layers=24)
    pruner = token_pruner(method)
    spent = pruner.operations(cost, 576, [(64, 64)] * 32)
    shown = rows_operations(LlavaConfig(vision_config=vision), 576, len(pruner.tower_layers))
    # Two projections of 577 patches, and all their pairs.
    assert shown == len(pruner.tower_layers) * (2 * 577 * 1024**2 + 577**2 * 1024)
    assert spent + shown < 0.01 * 32 * cost.operations(576)
