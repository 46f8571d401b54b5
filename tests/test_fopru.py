"""FoPru: single tokens or whole rows, by what they receive in the vision tower."""

from typing import Any

import pytest
import torch
from torch import Tensor

from structprune.errors import QualityError, UsageError
from structprune.runtime.tower_attention import TowerAttention
from tests.oracle import column_sets, padding_of, pictures, pruned, takes, token_pruner
from tests.pictures import FAMILIES, IMAGE, vision_model


@torch.no_grad()
def kept(family: str, batch: dict[str, Tensor], **fields: Any) -> list[list[int]]:
    """Return which tokens of the pictures stay, of every row, counted from its first visual token on."""
    model = vision_model(family)
    with pruned(model, token_pruner("fopru", **fields), batch):
        layer = model(**batch, use_cache=True).past_key_values.layers[-1]
    found = []
    for row, columns in enumerate(column_sets(layer, torch.zeros(len(batch["input_ids"]), dtype=torch.long))):
        places = batch["input_ids"][row].eq(IMAGE).nonzero().flatten().tolist()
        found.append([number for number, place in enumerate(places) if place in columns])
    return found


@torch.no_grad()
def received(batch: dict[str, Tensor]) -> Tensor:
    """Return what patches receive in the last layer but one of an eager tower, [images, 16]."""
    tower = vision_model("llava", attention="eager").model.vision_tower
    found = tower(batch["pixel_values"], output_attentions=True).attentions[-2]
    return found.mean((1, 2))[:, 1:]


def test_the_tokens_stay_that_receive_most_in_the_last_layer_but_one() -> None:
    batch = pictures("llava", 1, 1).batch()
    expected = [sorted(one.topk(5).indices.tolist()) for one in received(batch)]
    assert kept("llava", batch, target={"tokens": 5}) == expected


@pytest.mark.parametrize(("tokens", "rows"), [(4, 1), (7, 1), (8, 2), (15, 3)])
def test_rows_stay_whole(tokens: int, rows: int) -> None:
    batch = pictures("llava", 1, 1).batch()
    best = received(batch).view(2, 4, 4).mean(2).topk(rows).indices
    expected = [sorted(4 * row + column for row in one.tolist() for column in range(4)) for one in best]
    assert kept("llava", batch, strategy="row", target={"tokens": tokens}) == expected


def test_a_plan_of_rows_says_how_many_tokens_they_are() -> None:
    model, batch = vision_model("llava"), pictures("llava", 1).batch()
    plan = token_pruner("fopru", strategy="row", target={"keep_ratio": 0.6}).calibrate(model, [batch])
    assert plan.facts["tokens"] == 8
    pruner = token_pruner("fopru", strategy="row", target={"tokens": 3})
    with pytest.raises(UsageError, match="fewer than one row of 4 tokens") as caught:
        pruner.forecast(model)
    assert "strategy: rank" in caught.value.hint


@pytest.mark.parametrize("newlines", ["compete", "protect"])
def test_rows_of_an_image_in_tiles_reach_across_them_with_their_ends(newlines: str) -> None:
    # 4 x 4 patches of the whole, then 8 lines of 4 and a newline.
    batch = pictures("llava_next", 1).batch()
    (found,) = kept("llava_next", batch, strategy="row", target={"tokens": 27}, newlines=newlines)
    lines = [{*range(4 * row, 4 * row + 4)} for row in range(4)]
    tiles = [{*range(16 + 5 * row, 21 + 5 * row)} for row in range(8)]
    ends = {max(line) for line in tiles}
    whole = [line for line in lines + tiles if line - ends <= {*found}]
    assert {*found} == set().union(*whole) | (ends if newlines == "protect" else set())
    assert 20 < len(found) <= 27


def test_where_no_row_fits_the_best_tokens_of_the_best_row_stay() -> None:
    batch = pictures("llava_next", 1).batch()
    (found,) = kept("llava_next", batch, strategy="row", target={"tokens": 2})
    assert len(found) == 2 and (found[0] // 4 == found[1] // 4 if found[1] < 16 else found[0] >= 16)


def test_permuting_heads_of_the_tower_changes_nothing() -> None:
    batch = pictures("llava", 1).batch()
    model = vision_model("llava")
    with pruned(model, token_pruner("fopru"), batch), torch.no_grad():
        expected = model(**batch).logits
        attention = model.model.vision_tower.encoder.layers[-2].self_attn
        order = torch.arange(32).view(2, 16).flip(0).flatten()
        for one in (attention.q_proj, attention.k_proj, attention.v_proj):
            one.weight.copy_(one.weight[order].clone())
            one.bias.copy_(one.bias[order].clone())
        attention.out_proj.weight.copy_(attention.out_proj.weight[:, order].clone())
        assert torch.allclose(model(**batch).logits, expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_taken_and_rows_of_each_are_whole(family: str) -> None:
    assert takes("fopru", vision_model(family))
    batch = pictures(family, 1).batch()
    (found,) = kept(family, batch, strategy="row", target={"keep_ratio": 0.6})
    size = int(batch["input_ids"].eq(IMAGE).sum())
    assert 0 < len(found) <= 0.6 * size + 0.5


def test_a_tower_that_computes_no_numbers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = vision_model("llava"), pictures("llava", 1).batch()
    broken = torch.full((1, 17), torch.nan)
    monkeypatch.setattr(TowerAttention, "received", property(lambda _: broken))
    with (
        pruned(model, token_pruner("fopru"), batch),
        torch.no_grad(),
        pytest.raises(QualityError, match="fopru: a score of a visual token"),
    ):
        model(**batch)
    assert padding_of(batch).eq(0).all()
