"""VScan: a global and a local scan, what is merged, and the middle block."""

from typing import Any

import pytest
import torch
from torch import Tensor

from structprune.decide.token_target import counts_at
from structprune.errors import QualityError
from structprune.pruners.token.vscan import GLOBAL, LOCAL, VScan
from structprune.runtime.flops import BlockCost
from tests.oracle import column_sets, padding_of, pictures, pruned, takes, token_pruner
from tests.pictures import FAMILIES, IMAGE, vision_model
from tests.seen import Seen


def draw(side: int = 8) -> Seen:
    generator = torch.Generator().manual_seed(0)
    attention = {layer: torch.rand(3, side**2, generator=generator) for layer in (GLOBAL, LOCAL)}
    return Seen(attention, torch.randn(3, side**2, 8, generator=generator), side)


def chosen(seen: Seen, keep: int, **fields: Any) -> Tensor:
    return VScan(**fields).choose(seen, torch.full((3,), keep))


@pytest.mark.parametrize("keep", [1, 2, 7, 16, 33, 63])
@pytest.mark.parametrize("local", [0.0, 0.5, 1.0])
def test_both_scans_add_up_and_take_nothing_twice(keep: int, local: float) -> None:
    seen = draw()
    found = chosen(seen, keep, local=local)
    assert found.sum(1).tolist() == [keep] * 3
    count = int(keep * local)
    for image in range(3):
        everywhere, inside = (vars(seen)["attention"][layer][image] for layer in (GLOBAL, LOCAL))
        first = everywhere.topk(keep - count).indices.tolist()
        rest = {*found[image].nonzero().flatten().tolist()} - {*first}
        assert {*first} <= {*found[image].nonzero().flatten().tolist()} and len(rest) == count
        windows: dict[int, list[int]] = {}
        for token in range(64):
            if token not in first:
                windows.setdefault(token // 16 * 4 + token % 8 // 2, []).append(token)
        best = [sorted(mine, key=lambda one, inside=inside: -float(inside[one])) for mine in windows.values()]
        # Window by window the best, then the second best; what is left over goes to the best of all.
        expected: list[int] = []
        for number in range(4):
            line = sorted(
                (mine[number] for mine in best if len(mine) > number), key=lambda one: -float(inside[one])
            )
            expected += line[: count - len(expected)]
        assert rest == {*expected}


def test_every_window_has_its_share() -> None:
    found = chosen(draw(), 35, local=1.0).view(3, 4, 2, 4, 2).sum((2, 4))
    assert int(found.min()) == 2 and int(found.max()) == 3


def test_others_are_merged_into_what_is_most_like_them() -> None:
    seen = draw()
    found = chosen(seen, 9)
    weights = VScan().merge(seen, found)
    assert weights is not None
    for image in range(3):
        kept = found[image].nonzero().flatten().tolist()
        features = vars(seen)["given"][image]
        unit = features / features.norm(dim=1, keepdim=True)
        members: dict[int, list[int]] = {one: [one] for one in kept}
        for token in range(64):
            if token not in kept:
                members[kept[int((unit[kept] @ unit[token]).argmax())]].append(token)
        for one in kept:
            expected = torch.zeros(64)
            expected[members[one]] = 1 / len(members[one])
            assert torch.allclose(weights[image, one], expected)
        assert torch.allclose(weights[image][kept].sum(1), torch.ones(9))


def test_sixty_four_tokens_of_576_on_average_are_96_and_then_32() -> None:
    pruner, cost = VScan(), BlockCost(4096, 4096, 4096, 11008)
    counts = counts_at(pruner.target, 576, pruner.stages(32), 32, cost.operations)
    assert counts == [96] * 16 + [32] * 16 and sum(counts) / 32 == 64
    # Beside 3.8 T of a dense image, choosing costs less than a thousandth.
    assert pruner.operations(cost, 576, [(one, one) for one in counts]) < 1e-3 * 32 * cost.operations(576)


def test_in_the_middle_those_stay_that_the_last_token_looks_at() -> None:
    model, batch = vision_model("llava"), pictures("llava", 1).batch()
    visual = batch["input_ids"][0].eq(IMAGE).nonzero().flatten().tolist()
    with pruned(model, token_pruner("vscan", target={"tokens": 2}), batch), torch.no_grad():
        layers = model(**batch, use_cache=True).past_key_values.layers
        early, late = (
            [one for one in column_sets(layers[at], padding_of(batch))[0] if one in visual] for at in (1, 2)
        )
    # 2 of 16 is an eighth: to the power of log 6 / log 18 a little more than a quarter.
    assert (len(early), len(late)) == (4, 2) and {*late} < {*early}
    # The same again, with its second block's attention read off an eager kernel.
    model = vision_model("llava", attention="eager")
    noted: list[Tensor] = []
    attention = model.get_submodule("model.language_model.layers.1.self_attn")
    attention.register_forward_hook(lambda *args: noted.append(args[2][1]))
    with pruned(model, token_pruner("vscan", target={"tokens": 2}), batch), torch.no_grad():
        model(**batch)
    columns = [one for one in range(len(batch["input_ids"][0])) if one not in visual or one in early]
    paid = noted[0][0, :, -1].mean(0)
    best = sorted(early, key=lambda one: -float(paid[columns.index(one)]))[:2]
    assert sorted(best) == late


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_taken_and_a_plan_says_whose_attention_it_is(family: str) -> None:
    model, batch = vision_model(family), pictures(family, 1).batch()
    assert takes("vscan", model)
    said = token_pruner("vscan").calibrate(model, [batch]).facts["attention"]
    assert said.startswith("mean over all queries") == family.startswith("qwen")


def test_attention_that_is_no_number_is_named() -> None:
    seen = draw()
    vars(seen)["attention"][LOCAL][1, 5] = torch.nan
    with pytest.raises(QualityError, match="vscan: a score of a visual token"):
        chosen(seen, 4)
