"""How many visual tokens are left and what they cost: by hand, by papers, by torch's counter."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from structprune.decide.token_target import Target, count_at
from structprune.errors import UsageError
from structprune.plan.promise import Computed
from structprune.runtime.attach import attach, detach
from structprune.runtime.drop import Chooser, Drop
from structprune.runtime.flops import BlockCost, image_tokens, rows_operations, visual_operations
from structprune.runtime.tower_seen import layer_number
from structprune.runtime.view import View
from tests.oracle import TOKEN_METHODS, pictures, token_pruner
from tests.pictures import BLOCKS, IMAGE, vision_model

# LLaVA-1.5-7B.
VICUNA = BlockCost(4096, 4096, 4096, 11008)


def operations(count: int) -> int:
    """Return n * 30720 + n^2 * 128: what a block of the tiny models costs, worked out in the test below."""
    return 30720 * count + 128 * count**2


def test_a_block_costs_its_projections_its_attention_and_three_matrices() -> None:
    cost = BlockCost.of(vision_model("llava").config)
    assert cost == BlockCost(hidden=64, queries=64, keys=32, feed_forward=96)
    # 64 * (2 * 64 + 2 * 32) + 3 * 64 * 96 = 30720 a token, 2 * 64 = 128 a pair.
    assert [cost.operations(count) for count in (1, 16)] == [30848, 524288] == [*map(operations, (1, 16))]
    # A token that goes in between spares the feed-forward alone.
    assert cost.operations(16, 15) == 524288 - 3 * 64 * 96
    assert visual_operations(cost, [(16, 16), (16, 4), (4, 4)]) == 2 * 524288 - 12 * 18432 + operations(4)
    # n = 576 of LLaVA-1.5-7B: the 3.82 T that papers print.
    assert 32 * VICUNA.operations(576) == pytest.approx(3.817e12, rel=1e-3)


@pytest.mark.parametrize(
    ("target", "before", "left"),
    [
        ({"keep_ratio": 0.25}, 0, 4),
        ({"keep_ratio": 0.29}, 0, 5),  # 4.64
        ({"keep_ratio": 0.25}, Fraction(2, 5), 4),
        ({"tokens": 7}, Fraction(1, 2), 7),
        ({"tokens": 99}, 0, 16),
        # Two of five blocks compute all 16: (10 - 6.4) / 0.6 = 6.
        ({"avg_tokens": 10}, Fraction(2, 5), 6),
        ({"avg_tokens": 10.4}, 0, 10),
        # Half of 524288 is 262144; 8 tokens cost 253952, and 9 cost 286848.
        ({"visual_flops": 0.5}, 0, 8),
        ({"visual_flops": 0.75}, Fraction(1, 2), 8),
        ({"visual_flops": 1.0}, Fraction(1, 2), 16),
    ],
)
def test_what_is_left_is_the_nearest_count(target: dict[str, Any], before: Any, left: int) -> None:
    assert count_at(Target(**target), 16, Fraction(before), operations) == left


def test_a_hundred_tokens_at_29_percent_are_29() -> None:
    assert count_at(Target(keep_ratio=0.29), 100, Fraction(0), operations) == 29
    drop = Drop(0, False, torch.tensor(0.29, dtype=torch.float64), Replay())
    assert drop.keep(torch.tensor([100, 1, 3, 50])).tolist() == [29, 1, 1, 15]


@pytest.mark.parametrize(
    ("target", "before", "least"),
    [
        ({"keep_ratio": 0.01}, 0, 1 / 16),
        ({"avg_tokens": 6.5}, Fraction(2, 5), 7),
        # FastV with K = 2 on five blocks: two of them compute everything, and one token is left after.
        ({"visual_flops": 0.4}, Fraction(2, 5), 0.4 + 0.6 * 30848 / 524288),
        ({"visual_flops": 0.05}, 0, 30848 / 524288),
    ],
)
def test_less_than_one_token_is_refused_with_what_can_be_reached(
    target: dict[str, Any], before: Any, least: float
) -> None:
    with pytest.raises(UsageError, match="less than one token of an image of 16") as caught:
        count_at(Target(**target), 16, Fraction(before), operations)
    name = next(iter(target))
    said = float(caught.value.hint.split(" from ")[1].split(" ")[0])
    assert caught.value.hint.startswith(f"{name} can be from ") and 0 <= said - least < 2e-4
    assert count_at(Target(**{name: said}), 16, Fraction(before), operations) == 1


def test_a_target_is_one_number_in_its_range() -> None:
    for wrong in (
        {},
        {"tokens": 0},
        {"keep_ratio": 0},
        {"keep_ratio": 1.1},
        {"tokens": 3, "keep_ratio": 0.5},
    ):
        with pytest.raises(ValidationError):
            Target(**wrong)


def test_a_plan_says_all_numbers_that_people_ask_for() -> None:
    model, batch = vision_model("llava"), pictures("llava", 1).batch()
    assert image_tokens(model.config) == 16 and image_tokens(vision_model("qwen3_vl").config) is None
    facts = token_pruner("fastv", block=2, target={"visual_flops": 0.75}).calibrate(model, [batch]).facts
    assert (facts["tokens"], facts["visual_tokens"], facts["avg_tokens"]) == (8, 16, 12)
    assert facts["keep_ratio"] == 0.5 and facts["visual_flops"] == (524288 + 253952) / 2 / 524288
    for method in TOKEN_METHODS:
        with pytest.raises(UsageError, match="less than one token"):
            token_pruner(method, target={"keep_ratio": 0.02}).calibrate(model, [batch])


def test_what_fitprune_cannot_reach_is_refused() -> None:
    # One token after the first block, but sixteen in it.
    model, batch = vision_model("llava"), pictures("llava", 1).batch()
    with pytest.raises(UsageError, match="target: images need") as caught:
        token_pruner("fitprune", target={"visual_flops": 0.1}).calibrate(model, [batch])
    times = float(caught.value.hint.split(" ")[2])
    reached = token_pruner("fitprune", target={"visual_flops": 0.1001 * times}).calibrate(model, [batch])
    assert reached.facts["visual_flops"] < 0.101 * times


@pytest.mark.parametrize(
    ("family", "method", "fields", "more"),
    [
        # One of 16 tokens in the last block saves 34688 operations; a row of their attention takes 1024.
        ("llava", "fastv", {"block": 3, "target": {"tokens": 15}}, False),
        ("llava", "fastv", {"block": 3, "target": {"tokens": 16}}, False),
        # All pairs of 16 tokens of width 64 are 16384 products.
        ("llava", "divprune", {"target": {"tokens": 15}}, False),
        ("llava", "fitprune", {"target": {"visual_flops": 0.6}}, False),
        ("llava", "fitprune", {"target": {"keep_ratio": 1.0}}, False),
        ("llava", "random_tokens", {"target": {"tokens": 15}}, False),
        ("llava", "downsample", {"target": {"tokens": 9}}, False),
        # Of 1024 tokens, which is told of where sizes vary, 67 million; one token saves 1.2, a tenth 113.
        ("qwen2_5_vl", "divprune", {"target": {"keep_ratio": 0.9992}}, True),
        ("qwen2_5_vl", "divprune", {"target": {"keep_ratio": 0.9}}, False),
        ("llava_next", "divprune", {"target": {"keep_ratio": 0.9992}}, True),
        ("qwen3_vl", "divprune", {"target": {"keep_ratio": 0.9992}}, True),
    ],
)
def test_a_choice_that_costs_more_than_it_saves_is_told_and_made(
    family: str, method: str, fields: dict[str, Any], more: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = vision_model(family), pictures(family, 1).batch()
    pruner = token_pruner(method, **fields)
    notes = pruner.forecast(model).notes
    assert bool(notes) == more and all(f"{method}: to choose tokens" in one for one in notes)
    caplog.clear()
    plan = pruner.calibrate(model, [batch])
    said = [one for one in caplog.messages if "to choose tokens" in one]
    assert bool(said) == more
    left = fields["target"].get("tokens", plan.facts.get("tokens"))
    assert plan.facts.get("tokens") in (left, None)
    assert ("image_flops" in plan.facts) == (family == "llava" and len(plan) > 0)


def test_to_look_in_every_block_costs_more_than_a_few_tokens_save() -> None:
    # 67 million in every block that deletes; 51 of 1024 tokens save 58 million at most, half of them more.
    model = vision_model("qwen2_5_vl")
    (note,) = token_pruner("fitprune", target={"keep_ratio": 0.95}).forecast(model).notes
    assert note.startswith("fitprune: to choose tokens of an image costs up to 2.68e+08 operations")
    assert not token_pruner("fitprune", target={"keep_ratio": 0.2}).forecast(model).notes


def test_pairs_of_many_narrow_tokens_cost_more_than_a_few_of_them_save() -> None:
    # 1024 tokens of width 64 in a block: 1024^2 * 64 products, where a token saves 30720 + 128 * 2047.
    wide = token_pruner("divprune").operations(BlockCost(64, 64, 32, 96), 1024, [(1, 1)])
    assert operations(1024) - operations(700) > wide == 1024**2 * 64 > operations(1024) - operations(950)


class Replay:
    """Chooses once by a method, stage by stage, and then the same again without its cost."""

    newlines: Literal["protect", "compete"] = "compete"

    def __init__(self, chooser: Chooser | None = None) -> None:
        self.chooser = chooser
        self.tower_layers = () if chooser is None else chooser.tower_layers
        self.chosen: list[Tensor] = []
        self.next = self.merged = 0

    @classmethod
    def method(cls) -> str:
        return "replay"

    def watch(self, seen: View) -> None:
        """Note what the method notes, once."""
        if self.chooser is not None and self.next == len(self.chosen):
            self.chooser.watch(seen)

    def merge(self, seen: View, chosen: Tensor) -> None:
        """Keep tokens as they are, once what goes into them is known."""
        if self.chooser is not None and self.merged < self.next:
            self.merged = self.next
            self.chooser.merge(seen, chosen)

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        if self.next == len(self.chosen):
            assert self.chooser is not None
            self.chosen.append(self.chooser.choose(seen, keep))
        self.next += 1
        return self.chosen[self.next - 1]


@pytest.mark.parametrize("method", TOKEN_METHODS)
@pytest.mark.parametrize("target", [{"tokens": 5}, {"visual_flops": 0.65}])
def test_torch_counts_what_was_forecast(method: str, target: dict[str, Any]) -> None:
    model, batch = vision_model("llava", attention="eager"), pictures("llava", 1).batch()
    visual = batch["input_ids"].eq(IMAGE)
    text = {name: batch[name][~visual][None] for name in ("input_ids", "attention_mask")}
    pruner = token_pruner(method, target=target)
    plan = pruner.calibrate(model, [batch])
    drops = pruner.drops(plan, model)
    # One for all stages, which share their notes.
    replay = Replay(pruner)
    attach(model, "replay", [replace(drop, chooser=replay) for drop in drops])
    with_selection = _counted(model, batch)
    replay.next = 0
    counted, without = _counted(model, batch), _counted(model, text)
    detach(model)
    assert plan.promises is not None
    counts = [(one.attention, one.feed_forward) for one in plan.promises.stored if isinstance(one, Computed)]
    assert len(counts) == BLOCKS
    promised = counts
    if pruner.at_most:
        left = int(replay.chosen[0].sum())
        assert 1 <= left <= counts[-1][1]
        counts = [(left, left)] * BLOCKS
    cost, words = BlockCost.of(model.config), text["input_ids"].shape[1]
    # Text looks at visual tokens, and they at text: scores and values, both ways.
    crossing = sum(2 * 2 * entering * words * cost.queries for entering, _ in counts)
    forecast, full = visual_operations(cost, promised), visual_operations(cost, [(16, 16)] * BLOCKS)
    assert plan.facts["visual_flops"] == forecast / full
    assert counted - without - crossing == pytest.approx(visual_operations(cost, counts), rel=0.01)
    # What the choice itself costs is apart from this. Text is looked at too, and looks.
    shown = rows_operations(model.config, 16, len(pruner.tower_layers))
    costs = [pruner.operations(cost, 16, promised) + shown]
    with_text = [tuple(one + words for one in pair) for pair in promised]
    # At the embeddings nobody looked at anything yet.
    early = not pruner.within and [*pruner.stages(BLOCKS)] == [0]
    costs.append(pruner.operations(cost, 16 if early else 16 + words, with_text) + shown)
    # One row of attention is counted where every word asks.
    costs[1] *= words if method in ("sparsevlm", "transprune") else 1
    # And one word where all are compared with the features.
    costs[1] += 16 * cost.hidden * words if method in ("cdpruner", "recoverable") else 0
    # Of a tower's attention one row may do, beside the projections; and two names may mean one layer.
    layers = {layer_number(layer, 2) for layer in pruner.tower_layers}
    least = pruner.operations(cost, 16, promised) + len(layers) * 2 * 17 * 32**2
    # Distances are no products to torch's counter.
    least -= 16**2 * cost.hidden if method == "recoverable" else 0
    assert 0.99 * least <= with_selection - counted <= 1.01 * costs[1]
    assert (costs[0] == 0) == (method in ("downsample", "grid_tokens", "random_tokens", "tome"))
    chosen = pruner.operations(cost, 16, promised) + pruner.chosen_in_tower(model.config, 16, promised[-1][1])
    assert plan.facts["selection_flops"] == chosen / full


@torch.no_grad()
def _counted(model: Any, inputs: dict[str, Tensor]) -> int:
    """Return the multiplications of the language model's blocks, each with its addition."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1)
    kind = type(model).__name__
    blocks = [f"{kind}.model.language_model.layers.{index}" for index in range(BLOCKS)]
    return sum(sum(counter.get_flop_counts()[block].values()) for block in blocks) // 2


def test_the_recipe_of_fitprune_at_60_percent_costs_what_its_paper_says() -> None:
    deleted = [14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4]
    deleted += [26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0]
    left = [576]
    for gone in deleted:
        left.append(left[-1] - gone)
    assert len(deleted) == 32 and left[-1] == 127
    full = 32 * VICUNA.operations(576)
    as_run = visual_operations(VICUNA, [*pairwise(left)])
    # The paper deletes before the output projection, whose d^2 the deleted tokens then spare.
    as_counted = as_run - sum(deleted) * VICUNA.hidden**2
    assert as_run / full == pytest.approx(0.4050, abs=5e-5)
    assert as_counted / full == pytest.approx(0.4030, abs=5e-5)
    assert visual_operations(VICUNA, [(one, one) for one in left[:-1]]) / full == pytest.approx(
        0.4209, abs=5e-5
    )


def test_divprunes_56_tokens_cost_what_its_paper_says() -> None:
    """By its paper's convention: all tokens, text too, and two matrices of the feed-forward."""
    words = [15, 15, 23, 83, 25, 113, 15, 39, 21, 91, 57]

    def cost(tokens: int) -> int:
        return 4 * tokens * 4096**2 + 2 * tokens**2 * 4096 + 2 * tokens * 4096 * 11008

    ratios = [cost(text + 56) / cost(text + 576) for text in words]
    assert fmean(ratios) == pytest.approx(0.1563, abs=5e-5)
    assert count_at(Target(keep_ratio=0.098), 576, Fraction(0), VICUNA.operations) == 56
