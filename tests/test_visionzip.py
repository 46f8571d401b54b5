"""VisionZip: dominant tokens, and contextual ones that the others are merged into."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from structprune.errors import UsageError
from structprune.pruners.token.visionzip import VisionZip
from structprune.runtime.attach import attach, detach
from structprune.runtime.drop import Drop
from structprune.runtime.view import View
from tests.oracle import padding_of, pictures, takes, token_pruner
from tests.pictures import FAMILIES, IMAGE, vision_model

EXACT = 1e-5


class Noting(VisionZip):
    """The method, which remembers what it saw and did."""

    def merge(self, seen: View, chosen: Tensor) -> Tensor:
        found = super().merge(seen, chosen)
        last = seen.tower(-2)
        SEEN.append((chosen, found, last.attention, last.keys, seen.features(), seen.real))
        return found


SEEN: list[tuple[Tensor, ...]] = []


@contextmanager
def running(family: str, tokens: int, **fields: Any) -> Iterator[Any]:
    model = vision_model(family)
    SEEN.clear()
    attach(model, "noting", [Drop(0, False, torch.tensor(tokens), Noting(**fields))])
    yield model
    detach(model)


@torch.no_grad()
def read_by_first_block(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return what the first block reads, [batch, slots, hidden]."""
    read: list[Tensor] = []
    block = model.get_submodule("model.language_model.layers.0")
    note = block.register_forward_pre_hook(lambda _, args, kwargs: read.append(args[0]), with_kwargs=True)
    model(**batch)
    note.remove()
    return read[0]


def by_hand(attention: Tensor, keys: Tensor, keep: int, few: int) -> tuple[list[int], dict[int, list[int]]]:
    """Return the dominant tokens of one image, and of each contextual one what is merged into it."""
    dominant = sorted(attention.topk(keep - few).indices.tolist())
    rest = [one for one in range(len(attention)) if one not in dominant]
    targets = rest[:: len(rest) // few][:few]
    unit = keys / keys.norm(dim=1, keepdim=True)
    merged: dict[int, list[int]] = {one: [] for one in targets}
    for one in rest:
        if one not in targets:
            merged[targets[int((unit[targets] @ unit[one]).argmax())]].append(one)
    return dominant, merged


@pytest.mark.parametrize("compat", [False, True])
def test_tokens_are_kept_and_merged_as_the_paper_says(compat: bool) -> None:
    batch = pictures("llava", 2, 1).batch()
    with running("llava", 7, contextual=0.4, compat=compat) as model:
        states = read_by_first_block(model, batch)
    ((chosen, _, attention, keys, features, _),) = SEEN
    padding = padding_of(batch)
    for image, row in enumerate([0, 0, 1]):
        visual = batch["input_ids"][row].eq(IMAGE).nonzero().flatten()
        # 7 * 0.4 = 2.8: three tokens are contextual.
        dominant, merged = by_hand(attention[image], keys[image], 7, 3)
        assert chosen[image].nonzero().flatten().tolist() == sorted([*dominant, *merged])
        place = {one: features[image, one] for one in dominant}
        for one, others in merged.items():
            mean = features[image, others].mean(0) if others else 0
            place[one] = features[image, one] + mean if compat else features[image, [one, *others]].mean(0)
        order = [*dominant, *sorted(merged)] if compat else sorted(place)
        # Nine of the first picture are gone before the second.
        first = int(visual[16] - 9 if image == 1 else visual[0]) - int(padding[row])
        # Rows are filled up on the left with empty slots.
        width = len(batch["input_ids"][row]) - int(padding[row]) - 9 * (2 if row == 0 else 1)
        mine = states[row, states.shape[1] - width :][first : first + 7]
        assert torch.allclose(mine, torch.stack([place[one] for one in order]), atol=EXACT)


def test_a_mean_is_as_long_as_its_members_and_the_released_sum_is_longer() -> None:
    lengths = {}
    for compat in (False, True):
        batch = pictures("llava", 1).batch()
        with running("llava", 4, contextual=0.5, compat=compat) as model:
            read_by_first_block(model, batch)
        ((chosen, weights, *_),) = SEEN
        sums = weights[0].sum(1)[chosen[0]]
        lengths[compat] = sums.sort().values.tolist()
    assert lengths[False] == pytest.approx([1.0] * 4) and lengths[True] == pytest.approx([1, 1, 2, 2])


def test_ends_of_lines_are_neither_merged_nor_merged_into() -> None:
    batch = pictures("llava_next", 1, 1).batch()
    for tokens in (3, 12, 47, 48, 50):
        with running("llava_next", tokens, contextual=0.4) as model:
            read_by_first_block(model, batch)
        ((chosen, weights, _, _, _, real),) = SEEN
        for image in range(2):
            size = int(real[image].sum())
            width = 5 if size == 56 else 9
            ends = [one for one in range(16, size) if (one - 16) % width == width - 1]
            mixed = weights[image][chosen[image]]
            assert int(chosen[image].sum()) == tokens
            # A row that holds an end holds nothing else.
            rows = mixed[mixed[:, ends].any(1)]
            assert bool((rows > 0).sum(1).eq(1).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_says_whose_attention_it_is(family: str) -> None:
    model, batch = vision_model(family), pictures(family, 1).batch()
    assert takes("visionzip", model)
    said = token_pruner("visionzip").calibrate(model, [batch]).facts["attention"]
    assert said.startswith("mean over all queries") == family.startswith("qwen")


def test_without_contextual_tokens_the_highest_attention_stays_as_it_is() -> None:
    batch = pictures("llava", 1).batch()
    with running("llava", 5, contextual=0) as model:
        read_by_first_block(model, batch)
    ((chosen, weights, attention, *_),) = SEEN
    assert chosen[0].nonzero().flatten().tolist() == sorted(attention[0].topk(5).indices.tolist())
    assert torch.equal(weights[0][chosen[0]], torch.eye(16)[chosen[0]])


def test_features_of_others_are_refused() -> None:
    batch = pictures("llava", 1).batch()
    model = vision_model("llava")
    features = model.model.get_image_features(batch.pop("pixel_values"))
    with running("llava", 5) as model, pytest.raises(UsageError, match="features of images"):
        model(**batch, mm_encoder_outputs={"image": features})
