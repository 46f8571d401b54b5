"""PruMerge and PruMerge+: how many tokens stand out, what is sampled beside them, and what goes into them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from structprune.errors import QualityError
from structprune.pruners.token._outliers import OutlierTokens, outliers
from structprune.runtime.tower_attention import TowerAttention
from structprune.runtime.view import View
from tests.oracle import pictures, pruned, token_pruner
from tests.pictures import vision_model
from tests.seen import ragged

BOTH = ["prumerge", "prumerge_plus"]


def pruner(method: str, **fields: Any) -> OutlierTokens:
    """Build one of the two."""
    found = token_pruner(method, **fields)
    assert isinstance(found, OutlierTokens)
    return found


def test_outliers_by_hand() -> None:
    # Quartiles 2 and 4 of the five: above 4 + 1.5 * 2 stands one that is more than 7.
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 7.0, 99.0], [1.0, 2.0, 3.0, 4.0, 7.5, 99.0], [5.0] * 6])
    real = torch.arange(6) < torch.tensor([[5], [5], [6]])
    assert outliers(scores, real, 1.5).nonzero().tolist() == [[1, 4]]
    assert outliers(scores, real, 1.0).nonzero().tolist() == [[0, 4], [1, 4]]
    # Never more than a quarter.
    for seed in range(20):
        drawn = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
        assert int(outliers(drawn, torch.ones(4, 64, dtype=torch.bool), 0).sum(1).max()) <= 16


@pytest.mark.parametrize("outstanding", [0, 1, 3, 9])
def test_as_many_stay_as_stand_out_and_one_at_least(outstanding: int) -> None:
    seen = ragged(outstanding=outstanding)
    chosen = pruner("prumerge").choose(seen, torch.tensor([16, 10]))
    expected = vars(seen)["given"]["attention"][0].topk(max(outstanding, 1)).indices
    assert chosen[0].nonzero().flatten().tolist() == sorted(expected.tolist())
    assert int(chosen[1].sum()) == 1
    capped = pruner("prumerge").choose(seen, torch.tensor([2, 10]))
    assert int(capped[0].sum()) == min(max(outstanding, 1), 2)


@pytest.mark.parametrize(("outstanding", "cap", "samples"), [(3, 64, 9), (3, 8, 5), (9, 64, 27), (4, 4, 0)])
def test_a_sample_at_equal_distances_stays_too_and_none_twice(
    outstanding: int, cap: int, samples: int
) -> None:
    seen = ragged(outstanding=outstanding)
    keep = torch.tensor([cap, min(cap, 40)])
    alone, both = (pruner(method).choose(seen, keep) for method in BOTH)
    grid = {(2 * part + 1) * 64 // (2 * samples) for part in range(samples)}
    assert {*both[0].nonzero().flatten().tolist()} == {*alone[0].nonzero().flatten().tolist()} | grid
    assert int(both[0].sum()) <= cap
    # Of the other image only its own 40 tokens are sampled.
    assert int(both[1].sum()) in (1, 3, 4) and not bool(both[1, 40:].any())
    none = pruner("prumerge_plus", spread=0).choose(seen, keep)
    assert torch.equal(none, alone)


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("neighbours", [0, 5, 32, 1000])
@pytest.mark.parametrize("compat", [False, True])
def test_neighbours_go_into_what_stays_by_their_attention(method: str, neighbours: int, compat: bool) -> None:
    seen, mine = ragged(), pruner(method, neighbours=neighbours, compat=compat)
    chosen = mine.choose(seen, torch.tensor([16, 10]))
    weights = mine.merge(seen, chosen)
    assert weights is not None
    for image in range(2):
        paid, keys = (vars(seen)["given"][name][image] for name in ("attention", "keys"))
        going = (seen.real[image] & ~chosen[image]).nonzero().flatten()
        for token in chosen[image].nonzero().flatten().tolist():
            alike = torch.cosine_similarity(keys[going], keys[token], dim=-1)
            near = going[alike.argsort(descending=True)[:neighbours]].tolist()
            expected = torch.zeros(64)
            expected[[token, *near]] = paid[[token, *near]] / paid[[token, *near]].sum()
            if compat:
                expected[near], expected[token] = paid[near], 1
            assert torch.allclose(weights[image, token], expected, atol=1e-6)


@pytest.mark.parametrize("method", BOTH)
def test_an_image_is_merged_as_it_is_alone(method: str) -> None:
    seen, mine = ragged(), pruner(method)
    chosen = mine.choose(seen, torch.tensor([16, 10]))
    whole = mine.merge(seen, chosen)
    assert whole is not None
    alone = seen.part(1)
    assert torch.equal(mine.choose(alone, torch.tensor([10])), chosen[1:, :40])
    weights = mine.merge(alone, chosen[1:, :40])
    assert weights is not None
    stays = chosen[1, :40]
    assert torch.allclose(whole[1, :40][stays][:, :40], weights[0][stays], atol=1e-6)
    assert not bool(whole[1, :40][stays][:, 40:].any())


def test_ends_of_lines_neither_stand_out_nor_go_anywhere() -> None:
    model, batch = vision_model("llava_next"), pictures("llava_next", 1).batch()
    found: list[tuple[Tensor, Tensor]] = []

    class Watched(type(pruner("prumerge_plus"))):  # type: ignore[misc]
        def merge(self, seen: View, chosen: Tensor) -> Tensor:
            weights = super().merge(seen, chosen)
            found.append((seen.places[..., 2] < 0, weights * chosen[..., None]))
            assert isinstance(weights, Tensor)
            return weights

    Watched.__module__ = "structprune.pruners.token.prumerge_plus"
    for newlines in ("compete", "protect"):
        mine = Watched(target={"keep_ratio": 0.5}, newlines=newlines, neighbours=4)
        with pruned(model, mine, batch), torch.no_grad():
            model(**batch)
    (ends, weights), (none, _) = found
    assert bool(ends.any()) and not bool(none.any())
    assert not bool(weights.sum(1)[ends].any()) and not bool(weights.sum(2)[ends].any())


@pytest.mark.parametrize("method", BOTH)
def test_a_plan_says_at_most_and_a_tower_that_computes_no_numbers_is_named(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = vision_model("qwen2_5_vl"), pictures("qwen2_5_vl", 1).batch()
    plan = pruner(method).calibrate(model, [])
    assert "no class token" in plan.facts["attention"]
    llava = pruner(method).calibrate(vision_model("llava"), [])
    assert all(one.at_most for one in llava.promises.stored)
    with pruned(model, pruner(method), batch), torch.no_grad():
        real = TowerAttention.received.func  # type: ignore[attr-defined]
        monkeypatch.setattr(TowerAttention, "received", property(lambda one: real(one) * torch.nan))
        with pytest.raises(QualityError, match=f"{method}: a score of a visual token"):
            model(**batch)
