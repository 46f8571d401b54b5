"""Caches that lack columns: beams, crops and selections, new pictures, and positions counted anew."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from structprune.errors import UsageError
from structprune.runtime.cache import PrunedLayer
from tests.oracle import (
    column_sets,
    dropped_columns,
    generate,
    longer,
    masked_dense,
    pictures,
    pruned,
    token_pruner,
    worst,
)
from tests.pictures import FAMILIES, IMAGE, Pictures, vision_model
from tests.tiny import CACHE

EXACT, CLOSE = 1e-6, 1e-5
NONE = torch.zeros(3, dtype=torch.long)


@torch.no_grad()
def _next(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    """Return the logits of more text on a copy of a cache."""
    more = torch.cat([mask, torch.ones_like(ids)], 1)
    places = (more.cumsum(1) - 1)[:, -ids.shape[1] :]
    found: Tensor = model(
        input_ids=ids, attention_mask=more, position_ids=places, **{CACHE: copy.deepcopy(cache)}
    ).logits
    return found


@pytest.mark.parametrize("method", ["divprune", "fastv", "fitprune"])
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_rows_of_a_cache_can_be_reordered_repeated_and_selected(method: str, positions: str) -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    text, mask = torch.tensor([[7, 8], [9, 10], [11, 12]]), batch["attention_mask"]
    with pruned(model, token_pruner(method, positions=positions), batch), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        expected = _next(model, text, mask, cache)
        changes = {
            "reorder_cache": (torch.tensor([2, 0, 1]), [2, 0, 1]),
            "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
            "batch_select_indices": (torch.tensor([2, 1]), [2, 1]),
        }
        for name, (argument, rows) in changes.items():
            changed = copy.deepcopy(cache)
            getattr(changed, name)(argument)
            assert worst(_next(model, text[rows], mask[rows], changed), expected[rows]) < CLOSE, name


@pytest.mark.parametrize("method", ["divprune", "fastv", "fitprune"])
def test_a_cache_can_be_cut_back_to_its_prompt_and_no_further(method: str) -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    text, mask = torch.tensor([[7, 8], [9, 10], [11, 12]]), batch["attention_mask"]
    with pruned(model, token_pruner(method), batch), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        expected = _next(model, text, mask, cache)
        length, sets = cache.get_seq_length(), [column_sets(layer, NONE) for layer in cache.layers]
        guess = torch.full((3, 4), 20)
        more = torch.cat([mask, torch.ones_like(guess)], 1)
        model(input_ids=guess, attention_mask=more, **{CACHE: cache})
        assert cache.get_seq_length() == length + 4
        assert [len(row) for row in column_sets(cache.layers[-1], NONE)] == [len(row) + 4 for row in sets[-1]]
        cache.crop(-4)
        assert cache.get_seq_length() == length
        assert [column_sets(layer, NONE) for layer in cache.layers] == sets
        assert torch.equal(_next(model, text, mask, cache), expected)
        with pytest.raises(UsageError, match="cut into the tokens"):
            cache.crop(-1)
        cache.reset()
        assert cache.get_seq_length() == 0 and not any(layer.is_initialized for layer in cache.layers)
        again = model(**batch, **{CACHE: cache}).past_key_values
        assert [column_sets(layer, NONE) for layer in again.layers] == sets


def test_a_cache_that_does_not_know_how_many_blocks_there_are_grows_with_them() -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    for method in ("divprune", "fastv", "fitprune"):
        with pruned(model, token_pruner(method), batch), torch.no_grad():
            expected = model(**batch, use_cache=True)
            cache = DynamicCache()
            assert torch.equal(model(**batch, **{CACHE: cache}).logits, expected.logits)
            for mine, usual in zip(cache.layers, expected.past_key_values.layers, strict=True):
                assert torch.equal(mine.keys, usual.keys) and mine.get_seq_length() == usual.get_seq_length()
            assert torch.equal(model(**batch, use_cache=False).logits, expected.logits)


def _turn(model: Any, family: str, batch: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return a further turn with one picture a row: what a forward takes, and the whole conversation.

    Positions are those of the whole conversation, because Qwen's models find none for a part of it.
    """
    others = [Pictures(family, (1,), seed=9 + row) for row in range(2)]
    new = longer(batch, torch.tensor([[*other.rows[0][1:]] for other in others]))
    old = [pictures(family, 1, 1).pictures[row][0] for row in range(2)]
    mine = [other.pictures[0][0] for other in others]
    pixels = {name: torch.cat([one[name] for one in mine]) for name in mine[0]}
    for name in mine[0]:
        new[name] = torch.cat(
            [part for pair in zip(old, mine, strict=True) for part in (pair[0][name], pair[1][name])]
        )
    length = batch["input_ids"].shape[1]
    part = {"input_ids": new["input_ids"][:, length:], "attention_mask": new["attention_mask"], **pixels}
    if family.startswith("qwen"):
        places, _ = model.model.get_rope_index(
            new["input_ids"],
            new["mm_token_type_ids"],
            new["image_grid_thw"],
            attention_mask=new["attention_mask"],
        )
        part["position_ids"] = places[..., length:]
        part["mm_token_type_ids"] = new["mm_token_type_ids"][:, length:]
    return {"part": part, "whole": new}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["divprune", "fastv", "fitprune"])
def test_a_new_picture_is_the_only_one_that_loses_tokens(method: str, family: str) -> None:
    model, batch = vision_model(family), pictures(family, 1, 1).batch()
    length = batch["input_ids"].shape[1]
    with pruned(model, token_pruner(method), batch), torch.no_grad():
        first = model(**batch, use_cache=True).past_key_values
        before = [column_sets(layer, NONE[:2]) for layer in first.layers]
        turn = _turn(model, family, batch)
        second = model(**turn["part"], **{CACHE: first})
    for layer, sets in zip(second.past_key_values.layers, before, strict=True):
        for row, old in zip(column_sets(layer, NONE[:2]), sets, strict=True):
            assert [column for column in row if column < length] == old
    lost = turn["whole"]["input_ids"].shape[1] - max(
        len(row) for row in column_sets(second.past_key_values.layers[-1], NONE[:2])
    )
    assert lost > turn["whole"]["input_ids"].eq(IMAGE).sum(1).max() / 2
    expected = masked_dense(family, turn["whole"], second.past_key_values)[:, length:]
    text = turn["part"]["input_ids"].ne(IMAGE)
    assert worst(second.logits[text], expected[text]) < CLOSE


def test_dropped_twice_by_two_methods_is_a_masked_recomputation() -> None:
    model, batch = vision_model("qwen2_5_vl"), pictures("qwen2_5_vl").batch()
    first, second = token_pruner("divprune", target={"keep_ratio": 0.6}), token_pruner("fastv")
    with pruned(model, first, batch), pruned(model, second, batch):
        found = generate(model, batch)
        layers = found.past_key_values.layers
        assert layers[0].keys.shape[-2] > layers[-1].keys.shape[-2]
        assert dropped_columns(DynamicCache()) == 0 < dropped_columns(found.past_key_values)
    length = batch["input_ids"].shape[1]
    expected = masked_dense("qwen2_5_vl", longer(batch, found.sequences[:, length:-1]), found.past_key_values)
    assert worst(torch.stack(found.logits, 1), expected[:, length - 1 :]) < CLOSE


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("method", ["divprune", "random_tokens", "grid_tokens"])
def test_counted_anew_a_model_runs_as_if_dropped_tokens_had_never_been(method: str, family: str) -> None:
    model, prompts = vision_model(family), pictures(family)
    batch = prompts.batch()
    seen: list[Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    handle.remove()
    with pruned(model, token_pruner(method, positions="compact"), batch), torch.no_grad():
        prompt, found = model(**batch, use_cache=True), generate(model, batch)
    length = batch["input_ids"].shape[1]
    for row, kept in enumerate(column_sets(found.past_key_values.layers[0], NONE)):
        columns = [column for column in kept if column < length]
        plain = generate(model, {"inputs_embeds": seen[0][row : row + 1, columns]})
        assert torch.equal(plain.sequences[0], found.sequences[row, length:])
        for one, other in zip(plain.logits, found.logits, strict=True):
            assert worst(other[row], one[0]) < EXACT
        with torch.no_grad():
            dense = model(inputs_embeds=seen[0][row : row + 1, columns]).logits[0]
        assert worst(prompt.logits[row, columns], dense) < EXACT


@pytest.mark.parametrize("family", ["llava", pytest.param("llava_next", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["divprune", "fastv", "fitprune"])
def test_every_block_counts_what_it_has_anew_also_in_later_turns(method: str, family: str) -> None:
    model, batch = vision_model(family), pictures(family, 1, 1).batch()
    length = batch["input_ids"].shape[1]
    with pruned(model, token_pruner(method, positions="compact"), batch), torch.no_grad():
        found = generate(model, batch)
        whole = longer(batch, found.sequences[:, length:])
        expected = masked_dense(family, whole, found.past_key_values, compact=True)[:, length - 1 : -1]
        assert worst(torch.stack(found.logits, 1), expected) < CLOSE
        kept = masked_dense(family, whole, found.past_key_values)[:, length - 1 : -1]
        assert worst(torch.stack(found.logits, 1), kept) > CLOSE
        turn = _turn(model, family, batch)
        # As `generate` counts them, not with the padding.
        places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        first = model(**batch, position_ids=places, use_cache=True).past_key_values
        new = {name: turn["part"][name] for name in batch if name in ("pixel_values", "image_sizes")}
        second = generate(model, turn["whole"] | new, **{CACHE: first})
    whole = longer(turn["whole"], second.sequences[:, turn["whole"]["input_ids"].shape[1] :])
    expected = masked_dense(family, whole, second.past_key_values, compact=True)
    assert worst(torch.stack(second.logits, 1), expected[:, -6:-1]) < CLOSE


def test_positions_of_several_axes_are_not_counted_anew() -> None:
    for family in ("qwen2_5_vl", "qwen3_vl"):
        model, batch = vision_model(family), pictures(family).batch()
        with pytest.raises(UsageError, match="several axes"):
            token_pruner("fastv", positions="compact").calibrate(model, [batch])
        # The paper's positions, compact on a model of one axis, are kept here.
        pruner = token_pruner("divprune", positions=None)
        with pruned(model, pruner, batch):
            cache = generate(model, batch).past_key_values
        assert all(layer.shift is None for layer in cache.layers if isinstance(layer, PrunedLayer))
