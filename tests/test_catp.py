"""CATP: pictures that stand for themselves, a context that is ranked as one, and a query that comes last."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from structprune.errors import QualityError, UsageError
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View
from structprune.solvers.facility import facility
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
from tests.pictures import BLOCKS, FAMILIES, IMAGE, vision_model

EXACT, CLOSE = 1e-6, 1e-5


def _alike(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return similarities from 0 to 1 of random tokens, and what each is worth."""
    draw = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(tokens, 3, generator=draw), dim=1)
    return (1 + unit @ unit.T) / 2, torch.rand(tokens, generator=draw)


def _worth(alike: Tensor, bonus: Tensor, chosen: Any) -> float:
    return float(alike[:, chosen].amax(1).sum() + bonus[chosen].sum())


@pytest.mark.parametrize("seed", range(6))
def test_a_greedy_choice_is_near_the_best_of_all(seed: int) -> None:
    alike, bonus = _alike(11, seed)
    for keep in (1, 3, 5):
        best = max(_worth(alike, bonus, [*one]) for one in combinations(range(11), keep))
        assert _worth(alike, bonus, facility(alike, bonus, keep)) >= (1 - 1 / torch.e) * best
    first = int(facility(alike, bonus, 1))
    assert first == int((alike.sum(0) + bonus).argmax())


def test_gains_taken_off_one_by_one_are_those_worked_out_anew() -> None:
    alike, bonus = _alike(60, 9)
    found, naive = facility(alike, bonus, 60).tolist(), []
    for _ in range(60):
        free = [one for one in range(60) if one not in naive]
        naive.append(max(free, key=lambda one: _worth(alike.double(), bonus.double(), [*naive, one])))
    assert found[:40] == naive[:40] and sorted(found) == [*range(60)]
    # A longer choice begins with the shorter one.
    assert facility(alike, bonus, 7).tolist() == found[:7]


def test_what_is_worth_most_is_picked_first_and_equals_in_their_order() -> None:
    alike, bonus = _alike(9, 1)
    heavy = bonus.clone()
    heavy[6] += 100
    assert int(facility(alike, heavy, 1)) == 6
    assert facility(torch.ones(5, 5), torch.zeros(5), 5).tolist() == [0, 1, 2, 3, 4]


def test_a_token_that_is_like_the_text_stays_when_the_text_weighs_much() -> None:
    batch, seen = pictures("llava", 1).batch(), []
    pruner = _watching(seen, text=1000.0, target={"tokens": 1})
    model = vision_model("llava")
    with pruned(model, pruner, batch), torch.no_grad():
        model(**batch)
    one, keep, chosen = seen[0]
    words, real = one.text()
    like = torch.nn.functional.cosine_similarity(one.features()[0], words[0][real[0]].mean(0), dim=1)
    assert one.block == 0 and {*like.topk(int(keep)).indices.tolist()} == {
        *chosen[0].nonzero().flatten().tolist()
    }


def _watching(seen: list[tuple[View, Tensor, Tensor]], **fields: Any) -> Any:
    """Return the method, which notes what it sees, is asked for and chooses."""
    pruner = token_pruner("catp", **fields)
    kind = type(pruner)

    class Noting(kind):  # type: ignore[misc, valid-type]
        def choose(self, one: View, keep: Tensor) -> Tensor:
            chosen: Tensor = super().choose(one, keep)
            seen.append((one, keep, chosen))
            return chosen

    return Noting(**pruner.model_dump())


def _kept(batch: dict[str, Tensor], cache: Any) -> list[list[list[int]]]:
    """Return of every block and row how many tokens its pictures have."""
    found = []
    for layer in cache.layers:
        rows = []
        for row, kept in enumerate(
            column_sets(layer, torch.zeros(len(batch["input_ids"]), dtype=torch.long))
        ):
            visual = batch["input_ids"][row].eq(IMAGE)
            number = (visual & ~visual.roll(1)).cumsum(0)[[one for one in kept if visual[one]]]
            rows.append(torch.bincount(number, minlength=2)[1:].tolist())
        found.append(rows)
    return found


def test_the_context_goes_together_and_the_query_a_block_later() -> None:
    # At a quarter: 16 -> 16 * (1 / 4) ** power = 10 -> 4.
    batch = pictures("llava", 3, 1, 0).batch()
    model, seen = vision_model("llava"), []
    with pruned(model, _watching(seen, target={"keep_ratio": 0.25}), batch), torch.no_grad():
        counts = _kept(batch, model(**batch, use_cache=True).past_key_values)
    assert [one.block for one, _, _ in seen] == [0, 2, 3]
    assert counts[0] == counts[1] == [[10, 10, 10], [10], [0]]
    context, alone, none = counts[2]
    assert sum(context[:2]) == 8 and context[2] == 10 and alone == [10] and none == [0]
    assert min(context) >= 1
    assert counts[3] == [[*context[:2], 4], [4], [0]]
    # All in all as many as a quarter of all pictures.
    assert sum(map(sum, counts[3])) == round(0.25 * 64)


def test_scores_are_those_of_the_paper() -> None:
    batch, seen = pictures("llava", 2).batch(), []
    model = vision_model("llava", attention="eager")
    rows: list[Tensor] = []
    for block in model.model.language_model.layers:
        block.self_attn.register_forward_hook(
            lambda _, args, output: rows.append(output[1][0, :, -1].mean(0))
        )
    with pruned(model, _watching(seen, target={"tokens": 4}, query=0.3), batch), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    (first, _, _), (second, keep, chosen), (third, _, last) = seen
    assert first.block == 0
    visual = batch["input_ids"][0].eq(IMAGE)
    begins = (visual & ~visual.roll(1)).nonzero().flatten().tolist()
    kept = [column_sets(layer, padding_of(batch))[0] for layer in cache.layers]
    # The context, before block 2: both rows are of as many tokens.
    assert kept[0] == kept[1]
    slots = [slot for slot, place in enumerate(kept[1]) if visual[place] and place < begins[1]]
    sample = [slot for slot, place in enumerate(kept[1]) if place >= begins[1]]
    gained = (rows[1] - rows[0])[slots].clamp(min=0)
    states = second.states[0]
    cosine = torch.nn.functional.cosine_similarity
    expected = gained + 0.3 * cosine(states[slots], states[sample].mean(0), dim=1)
    assert bool(gained.gt(0).any())
    best = expected.topk(int(keep[0])).indices
    assert {*best.tolist()} == {*chosen[0].nonzero().flatten().tolist()} and bool(chosen[1].all())
    # The query, before block 3.
    shown = [slot for slot, place in enumerate(kept[2]) if visual[place] and place < begins[1]]
    asked = [slot for slot, place in enumerate(kept[2]) if visual[place] and place >= begins[1]]
    like = cosine(third.states[0][asked], third.states[0][shown].mean(0), dim=1)
    assert {*like.topk(4).indices.tolist()} == {*last[1].nonzero().flatten().tolist()}
    assert int(last[0].sum()) == len(shown) == 4


def test_a_single_picture_is_scored_by_its_question() -> None:
    batch, seen = pictures("llava", 1).batch(), []
    model = vision_model("llava")
    with pruned(model, _watching(seen, target={"tokens": 4}), batch), torch.no_grad():
        counts = _kept(batch, model(**batch, use_cache=True).past_key_values)
    assert counts == [[[10]], [[10]], [[10]], [[4]]]
    one, _, chosen = seen[-1]
    words, _ = one.text()
    like = torch.nn.functional.cosine_similarity(one.features()[0], words[0].mean(0), dim=1)
    assert {*like.topk(4).indices.tolist()} == {*chosen[0].nonzero().flatten().tolist()}
    # What a plan promises is what a prompt with one picture computes.
    plan = token_pruner("catp", target={"tokens": 4}).calibrate(model, [batch])
    assert plan.promises is not None and [one.attention for one in plan.promises.stored] == [10, 10, 10, 4]


def test_attention_that_gains_nothing_leaves_the_first_tokens() -> None:
    batch = pictures("llava", 2).batch()
    batch["pixel_values"] = torch.zeros_like(batch["pixel_values"])
    model = vision_model("llava")
    for block in model.model.language_model.layers:
        # Every token pays alike: nothing is gained from one block to the next.
        block.self_attn.q_proj.weight.data.zero_()
    seen: list[tuple[View, Tensor, Tensor]] = []
    with pruned(model, _watching(seen, query=0.0, target={"tokens": 4}), batch), torch.no_grad():
        model(**batch)
    _, keep, chosen = seen[1]
    assert chosen[0].tolist() == [place < int(keep[0]) for place in range(10)]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_several_pictures_are_as_alone_and_as_a_masked_recomputation(family: str) -> None:
    prompts = pictures(family, 3, 1, 2)
    model, batch = vision_model(family), prompts.batch()
    with pruned(model, token_pruner("catp", target={"keep_ratio": 0.25}), batch), torch.no_grad():
        together = model(**batch, use_cache=True)
        kept = [column_sets(layer, padding_of(batch)) for layer in together.past_key_values.layers]
        for row, ids in enumerate(prompts.rows):
            alone = model(**prompts.alone(row), use_cache=True)
            assert worst(together.logits[row, -len(ids) :], alone.logits[0]) < CLOSE
            for block, layer in enumerate(alone.past_key_values.layers):
                assert kept[block][row] == column_sets(layer, torch.zeros(1, dtype=torch.long))[0]
        found = generate(model, batch)
    length = batch["input_ids"].shape[1]
    expected = masked_dense(family, longer(batch, found.sequences[:, length:-1]), found.past_key_values)
    assert worst(torch.stack(found.logits, 1), expected[:, length - 1 :]) < CLOSE


def test_pictures_side_by_side_without_a_word_between_them_pass() -> None:
    prompts = pictures("llava", 2)
    ids = prompts.rows[0]
    prompts.rows[0] = [1, *[IMAGE] * 32, *ids[-3:]]
    model, batch = vision_model("llava"), prompts.batch()
    with pruned(model, token_pruner("catp", target={"tokens": 4}), batch), torch.no_grad():
        found = model(**batch, use_cache=True)
    assert bool(found.logits.isfinite().all())
    assert (
        int(
            batch["input_ids"][0]
            .eq(IMAGE)[column_sets(found.past_key_values.layers[3], padding_of(batch))[0]]
            .sum()
        )
        == 8
    )


def test_stages_are_as_deep_as_in_the_paper_and_few_blocks_are_refused() -> None:
    pruner = token_pruner("catp")
    assert {blocks: [*pruner.stages(blocks)] for blocks in (4, 5, 28, 32, 40)} == {
        4: [0, 3],
        5: [0, 3],
        28: [0, 6],
        32: [0, 7],
        40: [0, 9],
    }
    assert [*pruner.watched(32)] == [5]
    with pytest.raises(UsageError, match="catp: of 3 blocks none is left") as caught:
        pruner.stages(3)
    assert caught.value.hint == "it takes models with four blocks or more"
    assert BLOCKS == 4


def test_a_picture_that_is_no_number_is_named() -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    with pruned(model, token_pruner("catp"), batch), pytest.raises(QualityError, match="catp: a feature"):
        model(**batch | {"pixel_values": batch["pixel_values"] * torch.nan})


def test_choosing_costs_little_of_a_prefill() -> None:
    cost = BlockCost(4096, 4096, 4096, 11008)
    counts = [(352, 352)] * 7 + [(128, 128)] * 25
    spent = token_pruner("catp").operations(cost, 576, counts)
    assert spent == 576**2 * 4096 + 352 * 2 * 4096
    assert spent / (32 * cost.operations(576)) < 0.001
