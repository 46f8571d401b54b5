"""What methods see and choose, worked out by hand: attention rows, ties, numbers that are none."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from structprune.errors import QualityError, UsageError
from structprune.pruners.token._scored import ScoredTokens
from structprune.runtime.attach import attach, detach
from structprune.runtime.drop import Drop
from structprune.runtime.view import View
from tests.oracle import (
    TOKEN_METHODS,
    column_sets,
    generate,
    longer,
    masked_dense,
    merging,
    padding_of,
    pictures,
    pruned,
    token_pruner,
    worst,
)
from tests.pictures import BLOCKS, IMAGE, vision_model
from tests.tiny import CACHE

EXACT = 1e-6


class Probe:
    """Chooses nothing, and remembers what it could see."""

    newlines: Literal["protect", "compete"] = "compete"
    tower_layers: tuple[float, ...] = ()

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.last: list[Tensor] = []
        self.received: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def method(cls) -> str:
        return "probe"

    def watch(self, seen: View) -> None:
        """Note nothing."""

    def merge(self, seen: View, chosen: Tensor) -> None:
        """Keep tokens as they are."""

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        read = seen.read
        assert read is not None
        every = torch.arange(read.states.shape[1]).expand(len(read.states), -1)
        self.rows.append(read.rows(every))
        self.last.append(seen.paid_by_last())
        self.received.append(seen.received)
        return seen.real


@torch.no_grad()
def _probe(
    family: str, kernel: str, batch: dict[str, Tensor], **more: Any
) -> tuple[Probe, tuple[Tensor, ...]]:
    """Return what every block shows to a method, and the attention of an eager model."""
    eager = vision_model(family, attention="eager")(**batch, output_attentions=True, **more).attentions
    model, probe = vision_model(family, attention=kernel), Probe()
    attach(model, "probe", [Drop(index, True, None, probe) for index in range(BLOCKS)])
    model(**batch, **more)
    detach(model)
    return probe, eager


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_rows_are_those_of_an_eager_kernel(family: str, kernel: str, cached: bool) -> None:
    batch = pictures(family).batch()
    probe, eager = _probe(family, kernel, batch, use_cache=cached)
    real = batch["attention_mask"].bool()
    assert len(probe.rows) == len(eager) == BLOCKS and not bool(real.all())
    for rows, expected in zip(probe.rows, eager, strict=True):
        rows, expected = rows.transpose(1, 2), expected.transpose(1, 2)
        assert float((rows[real] - expected[real]).abs().max()) < EXACT
        assert torch.allclose(rows[real].sum(-1), torch.ones(()))
        # Padding on the left sees nothing; a kernel spreads its attention over everything there.
        assert bool(rows[~real].eq(0).all())


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_what_tokens_receive_is_summed_as_the_paper_says(family: str) -> None:
    prompts = pictures(family, 2, 1)
    batch = prompts.batch()
    probe, eager = _probe(family, "sdpa", batch)
    for (own, text), last, attention in zip(probe.received, probe.last, eager, strict=True):
        image = 0
        for row in range(2):
            most, mean = attention[row].amax(0), attention[row].mean(0)
            visual, real = batch["input_ids"][row].eq(IMAGE), batch["attention_mask"][row].bool()
            starts = (visual & ~visual.roll(1)).nonzero().flatten().tolist()
            for start in starts:
                end = start + int((~visual[start:]).int().argmax())
                asking = real & ~visual & (torch.arange(len(real)) >= end)
                size = end - start
                expected = most[start:end, start:end].sum(0), most[asking][:, start:end].sum(0)
                assert torch.allclose(own[image, :size], expected[0], atol=EXACT)
                assert torch.allclose(text[image, :size], expected[1], atol=EXACT)
                assert torch.allclose(last[image, :size], mean[-1, start:end], atol=EXACT)
                assert not bool(own[image, size:].any())
                image += 1
        assert image == len(own) == 3


def test_rows_in_a_second_turn_are_those_of_an_eager_kernel() -> None:
    batch, other = pictures("llava", 1).batch(), pictures("llava", 1)
    turn = torch.tensor([other.rows[0][1:]])
    whole = longer(batch, turn)
    whole["pixel_values"] = torch.cat([batch["pixel_values"]] * 2)
    with torch.no_grad():
        eager = vision_model("llava", attention="eager")(**whole, output_attentions=True).attentions
        model, probe = vision_model("llava"), Probe()
        attach(model, "probe", [Drop(index, True, None, probe) for index in range(BLOCKS)])
        cache = model(**batch, use_cache=True).past_key_values
        probe.rows.clear()
        model(
            input_ids=turn,
            attention_mask=whole["attention_mask"],
            pixel_values=batch["pixel_values"],
            **{CACHE: cache},
        )
    for rows, expected in zip(probe.rows, eager, strict=True):
        assert float((rows - expected[:, :, -turn.shape[1] :]).abs().max()) < EXACT


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_nothing_is_kept_twice_and_everything_in_order(method: str) -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    # Every picture has each of its tokens many times over: methods cannot tell them apart.
    batch["pixel_values"] = torch.zeros_like(batch["pixel_values"])
    pruner = token_pruner(method, target={"keep_ratio": 0.5})
    with pruned(model, pruner, batch), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    for layer in cache.layers:
        for row in column_sets(layer, padding_of(batch)):
            assert row == sorted({*row})


@pytest.mark.parametrize(
    "method", [name for name in TOKEN_METHODS if name not in ("downsample", "fitprune", "random_tokens")]
)
@pytest.mark.parametrize("tokens", [1, 5, 15])
def test_as_many_are_kept_as_was_asked(method: str, tokens: int) -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    pruner = token_pruner(method, target={"tokens": tokens})
    with pruned(model, pruner, batch), torch.no_grad():
        layer = model(**batch, use_cache=True).past_key_values.layers[-1]
    for row, kept in enumerate(column_sets(layer, torch.zeros(3, dtype=torch.long))):
        visual = batch["input_ids"][row].eq(IMAGE)
        images = int(visual.sum()) // 16
        found = int(visual[kept].sum())
        assert images <= found <= tokens * images if pruner.at_most else found == tokens * images


class Level(ScoredTokens):
    """Scores that are all equal, but for one."""

    def score(self, seen: View) -> Tensor:
        scores = torch.full(seen.real.shape, 0.25)
        scores[:, 7] = 0.5
        return scores


def test_of_equal_scores_the_first_are_kept() -> None:
    model, batch = vision_model("llava"), pictures("llava", 1).batch()
    attach(model, "level", [Drop(1, False, torch.tensor(4), Level())])
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    visual = batch["input_ids"][0].eq(IMAGE).nonzero().flatten()
    kept = {*column_sets(cache.layers[-1], padding_of(batch))[0]}
    assert [number for number, place in enumerate(visual.tolist()) if place in kept] == [0, 1, 2, 7]


@pytest.mark.parametrize("method", ["divprune", "fastv", "fitprune"])
def test_a_picture_that_is_no_number_stops_the_run_and_names_the_method(method: str) -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    with pruned(model, token_pruner(method), batch), torch.no_grad():
        expected = model(**batch).logits
        broken = batch["pixel_values"].clone()
        broken[1] = torch.nan
        with pytest.raises(QualityError, match=method):
            model(**batch | {"pixel_values": broken})
        assert torch.equal(model(**batch).logits, expected)


def test_a_fit_on_a_picture_that_is_no_number_stops() -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    batch["pixel_values"][1] = torch.nan
    with pytest.raises(QualityError, match="fitprune"):
        token_pruner("fitprune").calibrate(model, [batch])
    assert not any(len(module._forward_pre_hooks) for module in model.model.language_model.layers.modules())


def test_grid_tokens_stand_at_equal_distances() -> None:
    model, batch = vision_model("llava"), pictures("llava", 1).batch()
    with pruned(model, token_pruner("grid_tokens", target={"tokens": 4}), batch), torch.no_grad():
        layer = model(**batch, use_cache=True).past_key_values.layers[0]
    first = int(batch["input_ids"][0].eq(IMAGE).int().argmax())
    kept = [column - first for column in column_sets(layer, padding_of(batch))[0]]
    # The middles of four parts of 16.
    assert [one for one in kept if 0 <= one < 16] == [2, 6, 10, 14]


def test_random_tokens_are_the_same_for_a_seed_and_others_for_another() -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    found = []
    for seed in (0, 0, 1):
        with pruned(model, token_pruner("random_tokens", seed=seed), batch), torch.no_grad():
            layer = model(**batch, use_cache=True).past_key_values.layers[0]
            found.append(column_sets(layer, padding_of(batch)))
    assert found[0] == found[1] != found[2]


def test_fastv_keeps_what_the_last_token_looks_at_in_the_block_before() -> None:
    batch = pictures("llava", 1).batch()
    with torch.no_grad():
        eager = vision_model("llava", attention="eager")(**batch, output_attentions=True).attentions
    visual = batch["input_ids"][0].eq(IMAGE).nonzero().flatten()
    for block in (1, 3):
        expected = visual[eager[block - 1][0, :, -1, visual].mean(0).topk(5).indices].tolist()
        model = vision_model("llava")
        with pruned(model, token_pruner("fastv", block=block, target={"tokens": 5}), batch), torch.no_grad():
            layers = model(**batch, use_cache=True).past_key_values.layers
        assert layers[block - 1].get_seq_length() == layers[block - 1].keys.shape[-2]
        kept = column_sets(layers[block], padding_of(batch))[0]
        assert sorted(expected) == [one for one in kept if one in visual.tolist()]
    with pytest.raises(UsageError, match="leaves no block"):
        token_pruner("fastv", block=4).calibrate(vision_model("llava"), [batch])


class Average(ScoredTokens):
    """Keeps the first tokens, and merges into each the mean of all."""

    def score(self, seen: View) -> Tensor:
        return -torch.arange(seen.real.shape[1]).expand(seen.real.shape).float()

    def merge(self, seen: View, chosen: Tensor) -> Tensor:
        even = seen.real / seen.left[:, None]
        return even[:, None].expand(-1, seen.real.shape[1], -1).float()


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_what_is_merged_goes_into_the_tokens_that_stay_and_into_no_other(family: str, block: int) -> None:
    model, batch = vision_model(family), pictures(family).batch()
    inputs: list[Tensor] = []
    layer = model.model.language_model.layers[block]
    note = layer.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    note.remove()
    attach(model, "average", [Drop(block, False, torch.tensor(3), Average())])
    note = layer.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        found = model(**batch, use_cache=True)
    note.remove()
    whole, merged = inputs
    columns = column_sets(found.past_key_values.layers[block], torch.zeros(3, dtype=torch.long))
    for row, kept in enumerate(columns):
        visual = batch["input_ids"][row].eq(IMAGE)
        starts = (visual & ~visual.roll(1)).nonzero().flatten().tolist()
        mine = merged[row, -len(kept) :]
        for place, state in zip(kept, mine, strict=True):
            if not bool(visual[place]):
                assert torch.equal(state, whole[row, place])
                continue
            start = max(one for one in starts if one <= place)
            size = int((~visual[start:]).int().argmax())
            assert place - start < 3
            assert torch.allclose(state, whole[row, start : start + size].mean(0), atol=EXACT)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl"])
def test_what_runs_on_merged_tokens_is_a_dense_model_on_merged_states(family: str) -> None:
    model, batch = vision_model(family), pictures(family).batch()
    # In two stages, and of what the tower adds after the first blocks of Qwen3-VL too.
    attach(model, "first", [Drop(0, False, torch.tensor(6), Average())])
    attach(model, "second", [Drop(2, False, torch.tensor(3), Average())])
    with merging(model) as merges:
        found = generate(model, batch)
    assert [one.block for one in merges] == [0, 2]
    length = batch["input_ids"].shape[1]
    whole = longer(batch, found.sequences[:, length:-1])
    logits = torch.stack(found.logits, 1)
    expected = masked_dense(family, whole, found.past_key_values, merges=merges)[:, length - 1 :]
    assert worst(logits, expected) < 10 * EXACT
    # Each of the merges shows.
    for one in merges:
        other = masked_dense(family, whole, found.past_key_values, merges=[one])[:, length - 1 :]
        assert worst(logits[:2], other[:2]) > 1000 * EXACT
    # What is merged stays in its image.
    for merge in merges:
        number = merge.weights.ne(0)
        visual = batch["input_ids"].eq(IMAGE)
        assert not bool((number & (visual[:, :, None] != visual[:, None])).any())
        for row in range(3):
            starts = (visual[row] & ~visual[row].roll(1)).cumsum(0)
            into, of = number[row].nonzero(as_tuple=True)
            mixed = visual[row][into]
            assert torch.equal(starts[into[mixed]], starts[of[mixed]])


def test_the_text_of_an_image_is_what_stands_after_it() -> None:
    prompts = pictures("llava", 2, 1)
    batch = prompts.batch()
    model, found = vision_model("llava"), []

    class Reader(Level):
        def score(self, seen: View) -> Tensor:
            found.append((seen.states, seen.text(), seen.text(until_next=True)))
            return super().score(seen)

    attach(model, "reader", [Drop(0, False, torch.tensor(4), Reader())])
    with torch.no_grad():
        model(**batch)
    ((states, every, first),) = found
    image = 0
    for row in range(2):
        visual, real = batch["input_ids"][row].eq(IMAGE), batch["attention_mask"][row].bool()
        ends = (visual & ~visual.roll(-1)).nonzero().flatten().tolist()
        for number, end in enumerate(ends):
            text = (real & ~visual).nonzero().flatten()
            after = text[text > end]
            near = after if number + 1 == len(ends) else after[after < ends[number + 1]]
            for (values, mask), places in ((every, after), (first, near)):
                assert torch.equal(values[image][mask[image]], states[row, places])
            image += 1
    assert image == 3 and int(first[1][0].sum()) < int(every[1][0].sum())


def test_at_most_as_many_stay_as_are_allowed_and_never_none() -> None:
    model, batch = vision_model("llava"), pictures("llava", 1).batch()

    class Fewer(Probe):
        count = 2

        def choose(self, seen: View, keep: Tensor) -> Tensor:
            return torch.arange(seen.real.shape[1]).expand(seen.real.shape) < self.count

    fewer = Fewer()
    attach(model, "fewer", [Drop(1, False, torch.tensor(4), fewer, at_most=True)])
    for count, fine in ((2, True), (4, True), (5, False), (0, False)):
        fewer.count = count
        if fine:
            cache = model(**batch, use_cache=True).past_key_values
            kept = column_sets(cache.layers[1], padding_of(batch))[0]
            assert int(batch["input_ids"][0].eq(IMAGE)[kept].sum()) == count
        else:
            with pytest.raises(QualityError, match="probe kept"):
                model(**batch)
