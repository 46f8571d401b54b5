"""HoloV: crops share what is kept."""

import inspect
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from structprune.errors import QualityError
from structprune.pruners.token.holov import HoloV
from tests.oracle import pictures, pruned, takes, token_pruner
from tests.pictures import FAMILIES, vision_model
from tests.seen import Seen


def draw(images: int = 3, size: int = 36) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(images, size, generator=generator) ** 3
    return attention / attention.sum(1, keepdim=True), torch.randn(images, size, 8, generator=generator)


def chosen(seen: Seen, keep: int, **fields: Any) -> Tensor:
    return HoloV(**fields).choose(seen, torch.full((len(seen.real),), keep))


def by_hand(attention: Tensor, features: Tensor, crop: Tensor, keep: int) -> list[int]:
    """Return the paper's choice of one image, token by token, where every quota fits and is no tie."""
    unit = features / features.norm(dim=1, keepdim=True)
    varying = torch.zeros(len(crop))
    for token, mine in enumerate(crop.tolist()):
        others = [one for one in range(len(crop)) if crop[one] == mine and one != token]
        varying[token] = (unit[others] @ unit[token]).var(unbiased=False)
    score = attention + varying * attention.mean() / varying.mean()
    weight = torch.stack([score[crop == one].mean() for one in range(int(crop.max()) + 1)])
    share = weight / weight.sum() * keep
    quota = share.floor().long()
    for one in (share - quota).argsort(descending=True)[: keep - int(quota.sum())]:
        quota[one] += 1
    found = []
    for one, count in enumerate(quota.tolist()):
        inside = (crop == one).nonzero().flatten()
        found += inside[score[inside].topk(count).indices].tolist()
    return sorted(found)


def test_crops_share_what_is_kept_as_the_paper_says() -> None:
    attention, features = draw()
    crop = torch.tensor([[row // 3 * 2 + column // 3 for column in range(6)] for row in range(6)]).flatten()
    found = chosen(Seen({-2: attention}, features, 6), 10, crops=4)
    for image in range(3):
        expected = by_hand(attention[image], features[image], crop, 10)
        assert found[image].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("compat", [True, False])
@pytest.mark.parametrize("keep", [1, 5, 17, 35])
def test_as_many_are_kept_as_was_asked_and_no_crop_gives_more_than_it_has(keep: int, compat: bool) -> None:
    attention, features = draw()
    # All attention in one crop of four tokens: its quota does not fit there.
    attention[0] = 1e-6
    attention[0, [0, 1, 6, 7]] = 0.25
    found = chosen(Seen({-2: attention}, features, 6), keep, crops=9, compat=compat)
    assert found.sum(1).tolist() == [keep] * 3
    if keep > 10:
        assert bool(found[0, [0, 1, 6, 7]].all())


def test_equal_features_leave_quotas_to_attention_and_equal_attention_gives_equal_quotas() -> None:
    attention, features = draw()
    same = torch.ones_like(features)
    attention[0] = torch.tensor([3.0, 1.0]).repeat_interleave(18) / 72
    found = chosen(Seen({-2: attention}, same, 6), 8, crops=4)
    # 3 : 1 between the upper two crops and the lower two.
    assert [int(found[0, part].sum()) for part in (slice(0, 18), slice(18, 36))] == [6, 2]
    found = chosen(Seen({-2: torch.full_like(attention, 1 / 36)}, same, 6), 18, crops=4)[0].view(6, 6)
    each = [int(found[row : row + 3, column : column + 3].sum()) for row in (0, 3) for column in (0, 3)]
    assert sum(each) == 18 and max(each) - min(each) <= 1
    found = chosen(Seen({-2: attention}, features, 6), 18, crops=4, tau=0)[0].view(6, 6)
    each = [int(found[row : row + 3, column : column + 3].sum()) for row in (0, 3) for column in (0, 3)]
    assert max(each) - min(each) <= 1


def test_the_released_order_is_a_permutation_crop_by_crop_and_by_attention() -> None:
    attention, features = draw()
    seen, pruner = Seen({-2: attention}, features, 6), HoloV(crops=4, compat=True)
    found = pruner.choose(seen, torch.tensor([10] * 3))
    weights = pruner.merge(seen, found)
    assert weights is not None and HoloV(crops=4).merge(seen, found) is None
    for image in range(3):
        kept = found[image].nonzero().flatten()
        order = weights[image, kept].argmax(1).tolist()
        assert weights[image].sum(1)[kept].eq(1).all() and sorted(order) == kept.tolist()
        # Runs of nine of the raster; the highest attention first.
        expected = sorted(
            kept.tolist(), key=lambda one, image=image: (one // 9, -float(attention[image, one]))
        )
        assert order == expected != kept.tolist()
        for start in range(0, 36, 9):
            mine = [one for one in kept.tolist() if start <= one < start + 9]
            assert sorted(mine) == sorted(
                (attention[image, start : start + 9].topk(len(mine)).indices + start).tolist()
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_says_whose_attention_it_is(family: str) -> None:
    model, batch = vision_model(family), pictures(family, 1).batch()
    assert takes("holov", model)
    said = token_pruner("holov").calibrate(model, [batch]).facts["attention"]
    assert ("class token of" in said) == family.startswith("llava")


def test_numbers_of_crops_that_make_no_grid_and_attention_that_is_none_are_refused() -> None:
    with pytest.raises(ValidationError, match="square number"):
        HoloV(crops=10)
    attention, features = draw()
    attention[1, 3] = torch.nan
    with pytest.raises(QualityError, match="holov: a score of a visual token"):
        chosen(Seen({-2: attention}, features, 6), 3)
    assert "zeros" in inspect.getdoc(inspect.getmodule(HoloV))  # type: ignore[operator]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_row_that_goes_on_is_zero(family: str) -> None:
    model, batch = vision_model(family), pictures(family, 2, 1).batch()
    read: list[Tensor] = []
    block = model.get_submodule("model.language_model.layers.0")
    with pruned(model, token_pruner("holov", compat=True), batch), torch.no_grad():
        note = block.register_forward_pre_hook(lambda _, args, kwargs: read.append(args[0]), with_kwargs=True)
        logits = model(**batch).logits
        note.remove()
    real = read[0].any(-1)
    assert int((~real).sum(1).min()) == 0 and bool(logits.isfinite().all())
