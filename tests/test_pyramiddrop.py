"""Tokens that go in several stages: the counts of papers, targets of every kind, what each stage looks at."""

from itertools import pairwise
from statistics import fmean
from typing import Any

import pytest
import torch

from structprune.decide.token_target import Target, counts_at
from structprune.errors import InputError, UsageError
from structprune.plan.key import Key
from structprune.pruners.token._plan import check_tokens
from structprune.pruners.token._staged import StagedTokens
from structprune.runtime.flops import BlockCost
from tests.oracle import (
    column_sets,
    generate,
    longer,
    masked_dense,
    padding_of,
    pictures,
    pruned,
    token_pruner,
    worst,
)
from tests.pictures import BLOCKS, IMAGE, vision_model

# LLaVA-1.5-7B.
VICUNA = BlockCost(4096, 4096, 4096, 11008)
SIZE, DEPTH = 576, 32


def _counts(method: str, target: Target | None = None, size: int = SIZE) -> list[int]:
    pruner = token_pruner(method, **({} if target is None else {"target": target}))
    assert isinstance(pruner, StagedTokens)
    asked = type(pruner)().target if target is None else target
    return counts_at(asked, size, pruner.stages(DEPTH), DEPTH, VICUNA.operations)


@pytest.mark.parametrize(
    ("method", "mean", "left"),
    [
        ("pyramiddrop", 270.0, [576, 288, 144, 72]),
        ("transprune", 236.25, [576, 504, 360, 72]),
        ("sparsevlm", 202.75, [576, 300, 200, 110]),
    ],
)
def test_a_paper_leaves_as_many_as_it_says(method: str, mean: float, left: list[int]) -> None:
    counts = _counts(method)
    assert fmean(counts) == mean
    assert [counts[0], *(after for before, after in pairwise(counts) if after < before)] == left


@pytest.mark.parametrize(
    ("target", "reached"),
    [
        ({"keep_ratio": 0.0625}, lambda counts: counts[-1] / SIZE),
        ({"tokens": 36}, lambda counts: counts[-1]),
        ({"avg_tokens": 192}, fmean),
        ({"avg_tokens": 500}, fmean),
        (
            {"visual_flops": 0.4},
            lambda counts: sum(map(VICUNA.operations, counts)) / DEPTH / VICUNA.operations(SIZE),
        ),
    ],
)
def test_one_power_meets_a_target(target: dict[str, Any], reached: Any) -> None:
    counts = _counts("pyramiddrop", Target(**target))
    (asked,) = target.values()
    # One token more or less in the eight blocks of one stage.
    assert reached(counts) == pytest.approx(asked, rel=1e-3)
    left = [counts[block] for block in (0, 8, 16, 24)]
    assert counts == [one for one in left for _ in range(8)]
    shares = [after / before for before, after in pairwise(left)]
    # Each stage leaves as large a share as the one before, but for half a token.
    assert max(shares) - min(shares) < 1 / left[-1]


def test_what_no_power_reaches_is_refused_with_what_one_does() -> None:
    with pytest.raises(
        UsageError, match="avg_tokens 150 leaves less than one token of an image of 576"
    ) as caught:
        _counts("pyramiddrop", Target(avg_tokens=150))
    # Of 576 tokens 69 and 8 are left on the way to one: (576 + 69 + 8 + 1) / 4.
    assert caught.value.hint == "avg_tokens can be from 163.5 to 576"
    assert _counts("pyramiddrop", Target(avg_tokens=163.5))[7::8] == [576, 69, 8, 1]


def test_stages_stand_as_deep_as_in_the_paper() -> None:
    places = {blocks: [*token_pruner("pyramiddrop").stages(blocks)] for blocks in (2, 3, 4, 5, 28, 32, 40)}
    assert places == {
        2: [1],
        3: [1, 2],
        4: [1, 2, 3],
        5: [1, 3, 4],
        28: [7, 14, 21],
        32: [8, 16, 24],
        40: [10, 20, 30],
    }
    assert all([*token_pruner("pyramiddrop").stages(blocks).values()][-1] == 1 for blocks in places)
    with pytest.raises(UsageError, match="pyramiddrop: a model with one block"):
        token_pruner("pyramiddrop").stages(1)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("target", [{"tokens": 2}, {"keep_ratio": 0.125}])
def test_every_stage_computes_what_the_plan_says(family: str, target: dict[str, Any]) -> None:
    model, batch = vision_model(family), pictures(family, 1).batch()
    pruner = token_pruner("pyramiddrop", target=target)
    size = int(batch["input_ids"].eq(IMAGE).sum())
    with pruned(model, pruner, batch), torch.no_grad():
        plan = pruner.calibrate(model, [batch])
        layers = model(**batch, use_cache=True).past_key_values.layers
    kept = [
        int(batch["input_ids"][0].eq(IMAGE)[column_sets(one, padding_of(batch))[0]].sum()) for one in layers
    ]
    last = target.get("tokens", 0.125 * size)
    assert kept == [int(size * (last / size) ** (stage / 3) + 0.5) for stage in range(4)]
    assert len(plan) == 3
    if family == "llava":
        assert [one.attention for one in plan.promises.stored] == kept == [16, 8, 4, 2]
        assert plan.facts["avg_tokens"] == 7.5


def test_a_target_that_needs_the_size_of_an_image_is_refused_where_sizes_vary() -> None:
    model, batch = vision_model("qwen2_5_vl"), pictures("qwen2_5_vl", 1).batch()
    for target in ({"avg_tokens": 5}, {"visual_flops": 0.5}):
        with pytest.raises(UsageError, match="how many tokens an image has depends on the image") as caught:
            token_pruner("pyramiddrop", target=target).calibrate(model, [batch])
        assert caught.value.hint == "ask for keep_ratio or tokens"


def test_each_stage_looks_at_the_block_before_it() -> None:
    batch = pictures("llava", 1).batch()
    model = vision_model("llava", attention="eager")
    rows: list[torch.Tensor] = []
    for block in model.model.language_model.layers:
        block.self_attn.register_forward_hook(
            lambda _, args, output: rows.append(output[1][0, :, -1].mean(0))
        )
    with pruned(model, token_pruner("pyramiddrop", target={"tokens": 2}), batch), torch.no_grad():
        layers = model(**batch, use_cache=True).past_key_values.layers
    visual = batch["input_ids"][0].eq(IMAGE)
    kept = [column_sets(layer, padding_of(batch))[0] for layer in layers]
    for block, left in ((1, 8), (2, 4), (3, 2)):
        before = [
            (float(rows[block - 1][slot]), place)
            for slot, place in enumerate(kept[block - 1])
            if visual[place]
        ]
        expected = sorted(place for _, place in sorted(before, reverse=True)[:left])
        assert [place for place in kept[block] if visual[place]] == expected


def test_positions_counted_anew_at_every_stage_are_a_masked_recomputation() -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    pruner = token_pruner("pyramiddrop", positions=None)
    assert pruner.usual_positions == "compact"
    with pruned(model, pruner, batch):
        found = generate(model, batch)
    length = batch["input_ids"].shape[1]
    whole = longer(batch, found.sequences[:, length:-1])
    expected = masked_dense("llava", whole, found.past_key_values, compact=True)
    assert worst(torch.stack(found.logits, 1), expected[:, length - 1 :]) < 1e-5
    assert len({layer.keys.shape[2] for layer in found.past_key_values.layers}) == BLOCKS


@pytest.mark.parametrize("wrong", [[0.5, 0.5], [4.0, 0.0], [4.0, 1.5], [float("nan"), 0.5]])
def test_a_plan_with_a_count_and_a_power_that_make_no_share_is_refused(wrong: list[float]) -> None:
    model, batch = vision_model("llava"), pictures("llava", 1).batch()
    plan = token_pruner("pyramiddrop", target={"tokens": 2}).calibrate(model, [batch])
    blocks = [f"model.language_model.layers.{index}" for index in range(BLOCKS)]
    check_tokens(plan, blocks)
    key = next(key for key in plan if plan[key].numel() == 2)
    assert isinstance(key, Key) and plan[key].tolist() == [2.0, pytest.approx(1 / 3)]
    plan[key].copy_(torch.tensor(wrong))
    with pytest.raises(InputError, match="expected a number of tokens from 1"):
        check_tokens(plan, blocks)
