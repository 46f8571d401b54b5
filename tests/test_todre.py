"""ToDRE: greedy sums of distances against the naive form, and a late block that may drop all."""

from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from structprune.errors import UsageError
from structprune.pruners.token import todre
from structprune.solvers.max_sum import max_sum
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

LATE = BLOCKS - 1


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _picks(features: Tensor, keep: int, first: int = 0) -> list[int]:
    real = torch.ones(1, len(features), dtype=torch.bool)
    found = max_sum(features[None], real, torch.tensor([keep]), torch.tensor([first]))
    assert int(found.sum()) == keep
    return found[0].nonzero().flatten().tolist()


def _cosines(features: Tensor) -> Tensor:
    unit = normalize(features, dim=-1)
    return unit @ unit.T


def test_picks_are_those_of_the_naive_form() -> None:
    for seed in range(5):
        features = _drawn(30, 6, seed=seed)
        cosines, picks = _cosines(features), [seed]
        while len(picks) < 12:
            left = [one for one in range(30) if one not in picks]
            sums = torch.stack([cosines[one, picks].sum() for one in left])
            picks.append(left[int(sums.argmin())])
            assert _picks(features, len(picks), seed) == sorted(picks)


def test_distances_add_up_to_more_than_at_random_and_alike_tokens_are_not_kept_apart() -> None:
    singles = _drawn(50, 16)
    features = singles.repeat(2, 1)
    distances = 1 - _cosines(features)
    generator = torch.Generator().manual_seed(1)

    def total(picks: list[int]) -> float:
        return sum(float(distances[one, other]) for one, other in combinations(picks, 2))

    random = [total(torch.randperm(100, generator=generator)[:50].tolist()) for _ in range(20)]
    picks = _picks(features, 50)
    assert total(picks) > max(random)
    assert len({one % 50 for one in picks}) < 45


def test_images_side_by_side_are_as_alone() -> None:
    sizes, keep = [12, 1, 7], [4, 1, 7]
    features, real = torch.zeros(3, 12, 8), torch.zeros(3, 12, dtype=torch.bool)
    for image, size in enumerate(sizes):
        features[image, :size], real[image, :size] = _drawn(size, 8, seed=image), True
    found = max_sum(features, real, torch.tensor(keep), torch.tensor([3, 0, 2]))
    for image, first in enumerate([3, 0, 2]):
        mine = _picks(features[image, : sizes[image]], keep[image], first)
        assert found[image].nonzero().flatten().tolist() == mine


@torch.no_grad()
def test_the_first_pick_is_what_the_class_token_looks_at_most() -> None:
    batch = pictures("llava", 1, 1).batch()
    tower = vision_model("llava", attention="eager").model.vision_tower
    paid = tower(batch["pixel_values"], output_attentions=True).attentions[-1].mean(1)[:, 0, 1:]
    model = vision_model("llava")
    with pruned(model, token_pruner("todre", target={"tokens": 1}, tau=0), batch):
        layer = model(**batch, use_cache=True).past_key_values.layers[0]
    for row, columns in enumerate(column_sets(layer, torch.zeros(2, dtype=torch.long))):
        places = batch["input_ids"][row].eq(IMAGE).nonzero().flatten().tolist()
        assert [number for number, place in enumerate(places) if place in columns] == [
            int(paid[row].argmax())
        ]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_shares_are_those_of_an_eager_kernel(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pictures(family, 2, 1).batch()
    found: list[tuple[Tensor, Tensor]] = []
    to_text = todre.paid_to_text

    def note(seen: todre.View, asking: Tensor) -> Tensor:
        found.append((seen.paid_by_text().sum(1), to_text(seen, asking)))
        return found[-1][1]

    monkeypatch.setattr(todre, "paid_to_text", note)
    # What stays and is computed anew by an eager model: all but the tokens that go.
    model = vision_model(family)
    with pruned(model, token_pruner("todre", target={"keep_ratio": 0.5}), batch):
        cache = model(**batch, use_cache=True).past_key_values
    columns = column_sets(cache.layers[0], torch.zeros(2, dtype=torch.long))
    eager = vision_model(family, attention="eager")
    image = 0
    for row, kept in enumerate(columns):
        states = eager.get_input_embeddings()(batch["input_ids"][row, kept])[None]
        visual = batch["input_ids"].eq(IMAGE)
        features = torch.zeros(*visual.shape, states.shape[-1])
        given = {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}
        output = eager.get_image_features(**given)
        features[visual] = torch.cat([*output.pooler_output])
        mine = visual[row, kept]
        states[0, mine] = features[row, kept][mine]
        places = (torch.tensor(kept) - int(padding_of(batch)[row]))[None]
        # Of all tokens of the forward the rotary tables are gathered: these are their places.
        language = eager.model.language_model
        rows = (
            language(
                inputs_embeds=states,
                position_ids=places,
                attention_mask=torch.ones_like(places),
                output_attentions=True,
            )
            .attentions[LATE - 1][0]
            .mean(0)
        )
        starts = [place for place, one in enumerate(mine) if one and (place == 0 or not mine[place - 1])]
        for start in starts:
            end = start + int((~mine[start:]).int().argmax())
            text = ~mine
            after = text & (torch.arange(len(mine)) >= end)
            assert float(rows[after][:, start:end].sum(1).mean()) == pytest.approx(
                float(found[0][0][image]), abs=1e-5
            )
            assert float(rows[start:end][:, text].sum(1).mean()) == pytest.approx(
                float(found[0][1][image]), abs=1e-5
            )
            image += 1
    assert image == 3 == len(found[0][0])


def test_late_blocks_compute_text_alone_or_as_before() -> None:
    batch = pictures("llava").batch()
    visual = batch["input_ids"].eq(IMAGE)
    for tau, left in ((0.0, 4), (0.02, 4), (1.0, 0)):
        model = vision_model("llava")
        with pruned(model, token_pruner("todre", target={"tokens": 4}, tau=tau), batch), torch.no_grad():
            found = generate(model, batch)
        layers = found.past_key_values.layers
        columns = column_sets(layers[LATE], torch.zeros(3, dtype=torch.long))
        length = batch["input_ids"].shape[1]
        for row, kept in enumerate(columns):
            images = int(visual[row].sum()) // 16
            assert int(visual[row][[one for one in kept if one < length]].sum()) == left * images
            before = column_sets(layers[LATE - 1], torch.zeros(3, dtype=torch.long))[row]
            assert int(visual[row][[one for one in before if one < length]].sum()) == 4 * images
        whole = longer(batch, found.sequences[:, length:-1])
        expected = masked_dense("llava", whole, found.past_key_values)
        assert worst(torch.stack(found.logits, 1), expected[:, length - 1 :]) < 1e-5


def test_an_image_that_keeps_all_keeps_it_late_too() -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    with torch.no_grad():
        dense = model(**batch).logits
        with pruned(model, token_pruner("todre", target={"tokens": 16}, tau=1.0), batch):
            assert torch.equal(model(**batch).logits, dense)


def test_a_plan_says_at_most_and_what_attends() -> None:
    for tau in (0.0, 0.5):
        plan = token_pruner("todre", tau=tau).calibrate(vision_model("llava"), [])
        assert "class token" in plan.facts["attention"]
        assert all(one.at_most == (tau > 0) for one in plan.promises.stored)


def test_a_model_with_one_block_has_no_late_one() -> None:
    model = vision_model("llava")
    layers = model.model.language_model.layers
    model.config.text_config.num_hidden_layers, model.model.language_model.layers = 1, layers[:1]
    with pytest.raises(UsageError, match="tau: a model with one block") as caught:
        token_pruner("todre").forecast(model)
    assert caught.value.hint == "tau: 0"
    token_pruner("todre", tau=0).forecast(model)
