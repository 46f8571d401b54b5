"""Recoverable compression: what stands out to the tower, what the text recovers, what becomes of the rest."""

from typing import Any

import pytest
import torch
from torch import Tensor

from structprune.errors import QualityError
from structprune.pruners.token._outliers import outliers
from structprune.pruners.token.recoverable import Recoverable
from tests.oracle import pictures, pruned, token_pruner
from tests.pictures import vision_model
from tests.seen import Ragged, ragged

KEEP = torch.tensor([64, 40])


def chosen(seen: Ragged, keep: Tensor = KEEP, **fields: Any) -> tuple[Tensor, Tensor]:
    """Return what stays, and the weights of what is merged into it."""
    pruner = token_pruner("recoverable", **fields)
    assert isinstance(pruner, Recoverable)
    found = pruner.choose(seen, keep)
    weights = pruner.merge(seen, found)
    assert weights is not None
    return found, weights


def test_what_the_text_asks_for_is_added_and_nothing_taken_away() -> None:
    seen = ragged()
    features, words = seen.features(), seen.text()[0]
    paid = vars(seen)["given"]["attention"]
    asked = torch.stack(
        [torch.cosine_similarity(features[image], words[image].mean(0), dim=-1) for image in range(2)]
    )
    visual = outliers(paid, seen.real, 0.2)
    recovered = outliers(asked, seen.real & ~visual, 0.2)
    alone, _ = chosen(seen, clusters=0, iqr=0.2, text_iqr=None)
    both, weights = chosen(seen, clusters=0, iqr=0.2, text_iqr=0.2)
    assert bool(recovered.any()) and not bool((visual & recovered).any())
    assert torch.equal(alone, visual) and torch.equal(both, visual | recovered)
    # What stands out stays as it is.
    assert torch.equal(weights, torch.diag_embed(both.float()))
    # The text takes what room is left, the tower's first.
    few, _ = chosen(seen, torch.tensor([5, 40]), clusters=0, iqr=0.2, text_iqr=0.0)
    assert int(few[0].sum()) == 5 and (few & visual).sum(1).tolist()[0] == min(5, int(visual[0].sum()))


def test_a_token_that_the_question_means_is_recovered_if_the_tower_looks_at_it_least() -> None:
    seen = ragged()
    given = vars(seen)["given"]
    given["attention"][0, 17] = 0.0
    given["words"][0] = 3 * given["features"][0, 17]
    with_text, _ = chosen(seen, clusters=0)
    without, _ = chosen(seen, clusters=0, text_iqr=None)
    assert bool(with_text[0, 17]) and not bool(without[0, 17])


@pytest.mark.parametrize("clusters", [0.1, 0.3, 1.0])
def test_every_token_that_is_left_over_is_in_one_cluster(clusters: float) -> None:
    seen = ragged()
    kept, _ = chosen(seen, clusters=0)
    found, weights = chosen(seen, clusters=clusters)
    paid = vars(seen)["given"]["attention"][0]
    heads, over = (found[0] & ~kept[0]).nonzero().flatten().tolist(), 64 - int(kept[0].sum())
    parts = [weights[0, head].nonzero().flatten() for head in heads]
    together = torch.cat(parts)
    assert len(together) == len(together.unique()) == over
    assert not bool(kept[0, together].any())
    assert len(heads) == pytest.approx(clusters * over, abs=0.5)
    for head, part in zip(heads, parts, strict=True):
        # A mean, in the place of the strongest.
        assert head == int(part[paid[part].argmax()])
        assert torch.allclose(weights[0, head, part], torch.full((len(part),), 1 / len(part)))


def test_no_more_stay_than_the_cap_and_no_fewer_than_the_floor() -> None:
    seen = ragged()
    for cap in (1, 2, 5, 20):
        found, _ = chosen(seen, torch.tensor([cap, cap]), clusters=1.0)
        assert found.sum(1).tolist() == [cap, cap]
    for floor in (0.0, 0.5, 1.0):
        found, _ = chosen(seen, torch.tensor([30, 30]), clusters=0.0, floor=floor)
        assert bool((found.sum(1) >= max(1, floor * 30)).all())
    assert chosen(seen, torch.tensor([30, 30]), clusters=0.0)[0].sum(1).tolist()[1] == 1


def test_the_papers_order_puts_clusters_last() -> None:
    seen = ragged()
    kept, _ = chosen(seen, clusters=0)
    found, weights = chosen(seen)
    again, ordered = chosen(seen, compat=True)
    assert torch.equal(found, again)
    stays = found[0]
    cluster = stays & ~kept[0]
    expected = torch.cat([weights[0, stays & kept[0]], weights[0, cluster]])
    assert torch.equal(ordered[0, stays], expected) and int(cluster.sum()) > 1


def test_an_image_is_as_alone() -> None:
    seen = ragged()
    found, weights = chosen(seen)
    for image, size in enumerate([64, 40]):
        alone, mine = chosen(seen.part(image), torch.tensor([size]))
        assert torch.equal(alone[0], found[image, :size])
        assert torch.equal(mine[0], weights[image, :size, :size])
        assert not bool(found[image, size:].any())


def test_a_plan_says_what_stands_for_the_question() -> None:
    plan = token_pruner("recoverable").calibrate(vision_model("llava"), [])
    assert "embeddings of the language model" in plan.facts["question"]
    assert "class token" in plan.facts["attention"]
    assert all(one.at_most for one in plan.promises.stored)


def test_a_picture_that_is_no_number_stops_the_run() -> None:
    model, batch = vision_model("llava"), pictures("llava", 1).batch()
    with (
        pruned(model, token_pruner("recoverable"), batch),
        torch.no_grad(),
        pytest.raises(QualityError, match="recoverable: a score of a visual token"),
    ):
        model(**batch | {"pixel_values": torch.full_like(batch["pixel_values"], torch.nan)})
