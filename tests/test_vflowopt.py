"""VFlowOpt: what is important, what becomes one, and that as many are left as was asked for."""

from typing import Any

import pytest
import torch
from torch import Tensor

from structprune.decide.token_target import Target
from structprune.errors import QualityError
from structprune.runtime.attach import attach, detach
from structprune.runtime.drop import Drop
from structprune.runtime.view import View
from structprune.solvers.recycle import entropy, gathering, recycled
from tests.oracle import column_sets, padding_of, pictures, pruned, token_pruner
from tests.pictures import IMAGE, vision_model


def _random(tokens: int, seed: int = 0) -> Tensor:
    return torch.rand(3, tokens, generator=torch.Generator().manual_seed(seed))


def test_a_constant_patch_says_nothing_and_noise_much() -> None:
    noise = torch.rand(4, 1, 196, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1)
    assert entropy(torch.full((5, 3, 196), 0.3)).eq(0).all()
    assert bool((entropy(noise) > 6).all())
    # Two levels, as often as each other.
    assert float(entropy((torch.arange(196) % 2).expand(3, -1)[None].float())) == pytest.approx(1)


def test_one_cell_for_each_token_changes_nothing() -> None:
    importance, real = _random(9), torch.ones(3, 9, dtype=torch.bool)
    cells, keep = torch.arange(9).expand(3, -1), torch.tensor([4, 1, 9])
    chosen, into = recycled(importance, cells, real, keep)
    weights = gathering(importance, into)
    for image in range(3):
        best = importance[image].topk(int(keep[image])).indices
        assert sorted(best.tolist()) == chosen[image].nonzero().flatten().tolist()
        assert torch.equal(weights[image][chosen[image]], torch.eye(9)[chosen[image]])


def test_cells_become_one_by_hand() -> None:
    importance = torch.tensor([[0.9, 0.1, 0.3, 0.2, 0.0, 0.5]])
    cells, real = torch.tensor([[0, 0, 1, 1, 1, 1]]), torch.ones(1, 6, dtype=torch.bool)
    # Two stay as they are, 0 and 5; of the others 1 is alone in its cell, and 2, 3 and 4 become one.
    chosen, into = recycled(importance, cells, real, torch.tensor([4]))
    assert chosen[0].nonzero().flatten().tolist() == [0, 1, 2, 5]
    assert into.tolist() == [[0, 1, 2, 2, 2, 5]]
    weights = gathering(importance, into)[0]
    assert torch.allclose(weights[2], torch.tensor([0, 0, 0.6, 0.4, 0, 0]))
    # Room for one of two cells: that of the strongest token.
    chosen, into = recycled(importance, cells, real, torch.tensor([1]))
    assert chosen[0].nonzero().flatten().tolist() == [0] and into[0, 1] == 0
    assert torch.allclose(gathering(importance, into)[0, 0], torch.tensor([0.9, 0.1, 0, 0, 0, 0]))


@pytest.mark.parametrize("seed", range(5))
def test_cells_keep_weighted_sums_and_every_count_is_met(seed: int) -> None:
    importance, real = _random(30, seed), torch.arange(30) < torch.tensor([30, 21, 7])[:, None]
    cells = torch.randint(-1, 6, (3, 30), generator=torch.Generator().manual_seed(seed))
    states = torch.randn(3, 30, 4, generator=torch.Generator().manual_seed(seed))
    for count in range(1, 30):
        keep = torch.tensor([count, min(count, 21), min(count, 7)])
        chosen, into = recycled(importance, cells, real, keep)
        assert torch.equal(chosen.sum(1), keep) and not bool((chosen & ~real).any())
        mixed = gathering(importance, into) @ states
        for image, token in chosen.nonzero().tolist():
            members = into[image] == token
            held = importance[image][members]
            expected = (held[:, None] * states[image][members]).sum(0)
            assert torch.allclose(held.sum() * mixed[image, token], expected, atol=1e-5)
        assert bool((into[~real] == -1).all())


def test_importance_below_zero_counts_as_none() -> None:
    into = torch.tensor([[0, 0, 0]])
    assert gathering(torch.tensor([[1.0, -2.0, 1.0]]), into)[0, 0].tolist() == [0.5, 0, 0.5]
    assert torch.allclose(gathering(torch.tensor([[-1.0, -2.0, -1.0]]), into)[0, 0], torch.full((3,), 1 / 3))


class Shown:
    """Chooses nothing, and remembers what the tower showed."""

    newlines = "compete"
    tower_layers: tuple[float, ...] = (-2,)

    def __init__(self) -> None:
        self.found: dict[float, Tensor] = {}
        self.received = torch.empty(0)
        self.means = torch.empty(0)

    @classmethod
    def method(cls) -> str:
        return "shown"

    def merge(self, seen: View, chosen: Tensor) -> None:
        """Keep tokens as they are."""

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        tower = seen.tower(-2)
        self.received = tower.received
        self.found = {times: tower.from_sinks(times) for times in (0.0, 1.0, 1e9)}
        self.means = tower.of_pixels(lambda patches: patches.float().mean((-2, -1)))
        return seen.real


def _shown(family: str, batch: dict[str, Tensor]) -> Shown:
    model, shown = vision_model(family), Shown()
    attach(model, "shown", [Drop(0, False, None, shown)])  # type: ignore[arg-type]
    with torch.no_grad():
        model(**batch)
    detach(model)
    return shown


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_all_sinks_and_no_sink_are_the_mean_of_columns(family: str) -> None:
    shown = _shown(family, pictures(family, 2).batch())
    for times in (0.0, 1e9):
        assert torch.allclose(shown.found[times], shown.received, atol=1e-6)
    assert not torch.allclose(shown.found[1.0], shown.received, atol=1e-4)


@torch.no_grad()
def test_sinks_are_those_that_receive_more_by_hand() -> None:
    batch, model = pictures("llava", 2).batch(), vision_model("llava", attention="eager")
    tower: Any = model.model.vision_tower
    attention = tower(batch["pixel_values"], output_attentions=True).attentions[-2].mean(1)
    shown = _shown("llava", batch)
    for image, rows in enumerate(attention):
        sinks = rows.mean(0) > rows.mean(0).mean()
        assert torch.allclose(shown.found[1.0][image], rows[sinks].mean(0)[1:], atol=1e-6)


def test_pixels_are_those_of_the_patch() -> None:
    batch = pictures("llava", 2).batch()
    expected = torch.nn.functional.avg_pool2d(batch["pixel_values"].mean(1, keepdim=True), 8).flatten(1)
    assert torch.allclose(_shown("llava", batch).means, expected, atol=1e-6)
    batch = pictures("llava_next", 1).batch()
    whole = torch.nn.functional.avg_pool2d(batch["pixel_values"][:, 0].mean(1, keepdim=True), 8).flatten()
    assert torch.allclose(_shown("llava_next", batch).means[0, :16], whole, atol=1e-6)
    batch = pictures("qwen3_vl", 1).batch()
    # Four patches, which stand one after another, become one token.
    expected = batch["pixel_values"].mean(1).view(-1, 4).mean(1)
    assert torch.allclose(_shown("qwen3_vl", batch).means[0], expected, atol=1e-6)


def test_by_default_a_quarter_is_computed_in_the_mean() -> None:
    pruner = token_pruner("vflowopt", target={"keep_ratio": 0.2033})
    powers = pruner.stages(28)
    assert [*powers] == [0, 9, 18] and [*pruner.stages(5)] == [0, 2, 3]
    shares = [0.2033**power for power in powers.values()]
    mean = (9 * shares[0] + 9 * shares[1] + 10 * shares[2]) / 28
    assert shares == pytest.approx([0.3125, 0.2394, 0.2033]) and mean == pytest.approx(0.25, rel=0.01)


@pytest.mark.parametrize("average", [4.0, 6.5, 10.0])
def test_an_average_is_met(average: float) -> None:
    from structprune.decide.token_target import counts_at

    powers = token_pruner("vflowopt").stages(28)
    counts = counts_at(Target(avg_tokens=36 * average), 576, powers, 28, lambda one: one)
    assert sum(counts) / 28 == pytest.approx(36 * average, rel=0.01)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5])
@pytest.mark.parametrize("cell", [1, 2])
def test_as_many_are_left_as_was_asked(cell: int, alpha: float) -> None:
    model, batch = vision_model("llava_next"), pictures("llava_next", 1, 2).batch()
    for share in (0.1, 0.5, 0.9):
        pruner = token_pruner("vflowopt", cell=cell, alpha=alpha, target={"keep_ratio": share})
        with pruned(model, pruner, batch), torch.no_grad():
            layer = model(**batch, use_cache=True).past_key_values.layers[-1]
        for row, kept in enumerate(column_sets(layer, torch.zeros(2, dtype=torch.long))):
            visual = batch["input_ids"][row].eq(IMAGE)
            starts = (visual & ~visual.roll(1)).nonzero().flatten().tolist()
            sizes = [int((~visual[start:]).int().argmax()) for start in starts]
            assert int(visual[kept].sum()) == sum(int(share * size + 0.5) for size in sizes)
    assert padding_of(batch).shape == (2,)


def test_a_picture_that_is_no_number_stops_the_run() -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    broken = batch["pixel_values"].clone()
    broken[1] = torch.nan
    with pruned(model, token_pruner("vflowopt"), batch), pytest.raises(QualityError, match="vflowopt"):
        model(**batch | {"pixel_values": broken})
