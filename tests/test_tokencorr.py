"""TokenCorr: how dense parts of an image are, what stays of them, and where the others go."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from structprune.errors import QualityError
from structprune.pruners.token.tokencorr import TokenCorr
from tests.oracle import pictures, pruned, token_pruner
from tests.pictures import vision_model
from tests.seen import Ragged, ragged

KEEP = torch.tensor([64, 40])


def pruner(**fields: Any) -> TokenCorr:
    """Build one."""
    found = token_pruner("tokencorr", **fields)
    assert isinstance(found, TokenCorr)
    return found


def page(blank: int) -> Ragged:
    """Return images whose first tokens, so many, all have one key; the others have keys of their own."""
    seen = ragged()
    keys = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(1))
    keys[:, :blank] = keys[:, :1].clone()
    vars(seen)["given"]["keys"] = keys
    return seen


@pytest.mark.parametrize(
    ("blank", "left"), [(0, [64, 40]), (9, [64, 40]), (10, [54, 30]), (32, [32, 8]), (64, [7, 4])]
)
def test_what_repeats_itself_more_often_than_allowed_is_redundant(blank: int, left: list[int]) -> None:
    # 10 alike have 9 others each, which is more than 8; at least a tenth of an image is left, rounded up.
    seen, mine = page(blank), pruner()
    chosen = mine.choose(seen, KEEP)
    assert chosen.sum(1).tolist() == left
    paid = vars(seen)["given"]["attention"]
    for image, count in enumerate(left):
        assert {*chosen[image].nonzero().flatten().tolist()} == {*paid[image].topk(count).indices.tolist()}


def test_a_lower_threshold_finds_more_redundant_and_the_target_is_a_cap() -> None:
    seen = ragged()
    counts = [
        pruner(similarity=one, duplicates=4).choose(seen, KEEP).sum(1) for one in (1.0, 0.7, 0.5, 0.3, -1.0)
    ]
    for more, fewer in pairwise(counts):
        assert bool((more >= fewer).all())
    assert counts[0].tolist() == [64, 40] and counts[-1].tolist() == [7, 4]
    for least, cap in ((0.1, 3), (1.0, 20), (0.5, 32)):
        found = pruner(similarity=-1.0, least=least).choose(seen, torch.tensor([cap, cap])).sum(1).tolist()
        assert found == [min(cap, -(-int(10 * least) * size // 10)) for size in (64, 40)]


def test_others_go_into_the_nearest_that_stays() -> None:
    seen, mine = page(32), pruner()
    chosen = mine.choose(seen, KEEP)
    weights = mine.merge(seen, chosen)
    assert weights is not None
    keys = normalize(vars(seen)["given"]["keys"], dim=-1)
    for image in range(2):
        stays = chosen[image].nonzero().flatten()
        assert torch.allclose(weights[image, stays].sum(1), torch.ones(len(stays)))
        # Every token is in one mean.
        assert bool((weights[image, stays] > 0).sum(0)[seen.real[image]].eq(1).all())
        for token in (seen.real[image] & ~chosen[image]).nonzero().flatten().tolist():
            nearest = stays[(keys[image, stays] @ keys[image, token]).argmax()]
            assert float(weights[image, nearest, token]) > 0


def test_parts_of_an_image_have_densities_of_their_own() -> None:
    seen, mine = page(32), pruner()
    # The first half, all alike, is the whole image; the second is its tiles.
    vars(seen)["places"][:, 32:, 0] = 1
    chosen = mine.choose(seen, KEEP)
    assert chosen[0, :32].sum() == 4 and bool(chosen[0, 32:].all())
    weights = mine.merge(seen, chosen)
    assert weights is not None and not bool(weights[0, :32][chosen[0, :32]][:, 32:].any())
    capped = mine.choose(seen, torch.tensor([9, 9]))
    assert capped[0, :32].sum() == 1 and capped[0, 32:].sum() == 8


def test_an_image_is_as_alone() -> None:
    seen, mine = page(20), pruner()
    chosen = mine.choose(seen, KEEP)
    weights = mine.merge(seen, chosen)
    assert weights is not None
    for image, size in enumerate([64, 40]):
        alone = mine.choose(seen.part(image), torch.tensor([size]))
        merged = mine.merge(seen.part(image), alone)
        assert merged is not None and torch.equal(alone[0], chosen[image, :size])
        stays = alone[0]
        assert torch.equal(merged[0, stays], weights[image, :size, :size][stays])


def test_an_image_of_one_colour_keeps_less_than_one_of_noise() -> None:
    model, batch = vision_model("llava"), pictures("llava", 1, 1).batch()
    batch["pixel_values"][0] = 0.5
    # What the tower knows of places alone tells patches of one colour apart.
    model.model.vision_tower.embeddings.position_embedding.weight.data.mul_(0.01)
    counts: list[Tensor] = []

    class Watched(TokenCorr):
        def choose(self, seen: Any, keep: Tensor) -> Tensor:
            counts.append(super().choose(seen, keep).sum(1))
            return super().choose(seen, keep)

    Watched.__module__ = TokenCorr.__module__
    with pruned(model, Watched(duplicates=3, similarity=0.95), batch), torch.no_grad():
        model(**batch)
    assert counts[0].tolist() == [2, 11]


def test_a_plan_says_at_most() -> None:
    plan = pruner().calibrate(vision_model("llava"), [])
    assert all(one.at_most for one in plan.promises.stored) and "class token" in plan.facts["attention"]


def test_a_picture_that_is_no_number_stops_the_run() -> None:
    model, batch = vision_model("llava"), pictures("llava", 1).batch()
    with (
        pruned(model, pruner(), batch),
        torch.no_grad(),
        pytest.raises(QualityError, match="tokencorr: a score of a visual token"),
    ):
        model(**batch | {"pixel_values": torch.full_like(batch["pixel_values"], torch.nan)})
