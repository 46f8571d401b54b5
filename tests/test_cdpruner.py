"""CDPruner: greedy picks against brute force, and what relevance is made of."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from structprune.errors import QualityError
from structprune.pruners.token.cdpruner import CdPruner
from structprune.runtime.view import View
from structprune.solvers.determinantal import determinantal
from tests.oracle import pictures, pruned, token_pruner
from tests.pictures import vision_model


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _kernel(features: Tensor, weight: Tensor) -> Tensor:
    unit = normalize(features, dim=-1)
    return weight[:, None] * (unit @ unit.T) * weight


def _picks(kernel: Tensor, keep: int) -> list[int]:
    real = torch.ones(1, len(kernel), dtype=torch.bool)
    found = determinantal(kernel[None], real, torch.tensor([keep]))
    assert int(found.sum()) == keep
    return found[0].nonzero().flatten().tolist()


def _naive(kernel: Tensor, keep: int) -> list[int]:
    """Try every token at every pick, and take the one with the largest determinant."""
    picks: list[int] = []
    for _ in range(keep):
        left = [one for one in range(len(kernel)) if one not in picks]
        parts = [kernel[[*picks, one]][:, [*picks, one]].double() for one in left]
        picks.append(left[int(torch.stack([part.det() for part in parts]).argmax())])
    return sorted(picks)


def test_three_tokens_by_hand() -> None:
    # Of two alike the more relevant goes first; the other adds less than one unlike both.
    kernel = _kernel(torch.tensor([[1.0, 0.0], [0.995, 0.1], [0.0, 1.0]]), torch.tensor([0.9, 1.0, 0.5]))
    assert [_picks(kernel, keep) for keep in (1, 2, 3)] == [[1], [1, 2], [0, 1, 2]]


def test_picks_are_those_of_brute_force_and_begin_those_of_more() -> None:
    for seed in range(10):
        kernel = _kernel(_drawn(12, 16, seed=seed), _drawn(12, seed=100 + seed).abs() + 0.1)
        found = [_picks(kernel, keep) for keep in range(1, 10)]
        assert found == [_naive(kernel, keep) for keep in range(1, 10)]
        assert all({*less} < {*more} for less, more in pairwise(found))


def test_tokens_that_are_all_unlike_go_by_relevance_alone() -> None:
    weight = torch.rand(20, generator=torch.Generator().manual_seed(0))
    assert _picks(torch.diag(weight**2), 7) == sorted(weight.topk(7).indices.tolist())


def test_with_equal_relevance_no_token_goes_twice_before_all_go_once() -> None:
    singles = _drawn(20, 32)
    features = singles.repeat(2, 1)[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    kernel = _kernel(features, torch.ones(40))
    assert len(features[_picks(kernel, 20)].unique(dim=0)) == 20
    # More than the features span: none twice, the rest by what is left of the diagonal.
    assert len({*_picks(kernel, 33)}) == 33
    assert _picks(torch.ones(6, 6), 4) == [0, 1, 2, 3]
    assert _picks(torch.zeros(6, 6), 4) == [0, 1, 2, 3]


def test_images_side_by_side_are_as_alone() -> None:
    sizes, keep = [12, 1, 7], [4, 1, 7]
    kernel, real = torch.zeros(3, 12, 12), torch.zeros(3, 12, dtype=torch.bool)
    for image, size in enumerate(sizes):
        mine = _kernel(_drawn(size, 16, seed=image), _drawn(size, seed=image).abs() + 0.1)
        kernel[image, :size, :size], real[image, :size] = mine, True
    found = determinantal(kernel, real, torch.tensor(keep))
    for image, (size, count) in enumerate(zip(sizes, keep, strict=True)):
        assert found[image].nonzero().flatten().tolist() == _picks(kernel[image, :size, :size], count)


@pytest.mark.parametrize("compat", [False, True])
def test_relevance_is_scaled_image_by_image(compat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = vision_model("llava"), pictures("llava", 2, 1).batch()
    found: list[tuple[View, Tensor]] = []
    relevance = CdPruner.relevance

    def note(self: CdPruner, seen: View, unit: Tensor) -> Tensor:
        found.append((seen, relevance(self, seen, unit)))
        return found[-1][1]

    monkeypatch.setattr(CdPruner, "relevance", note)
    with pruned(model, token_pruner("cdpruner", compat=compat), batch), torch.no_grad():
        model(**batch)
    ((seen, weights),) = found
    words, real = seen.text()
    for features, text, here, weight in zip(seen.features(), words, real, weights, strict=True):
        mean = torch.stack([torch.cosine_similarity(features, one, dim=-1) for one in text[here]]).mean(0)
        mean = -mean if compat else mean
        expected = (mean - mean.min() + 1e-6) / (mean.max() - mean.min())
        assert torch.allclose(weight, expected, atol=1e-5)
        assert 0 < float(weight.min()) < 1e-4 and float(weight.max()) == pytest.approx(1, abs=1e-4)


def test_without_a_weight_on_relevance_only_diversity_counts() -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    logits = []
    for fields in ({"theta": 0.0}, {"theta": 0.0, "compat": True}, {"theta": 0.9}, {}):
        with pruned(model, token_pruner("cdpruner", **fields), batch), torch.no_grad():
            logits.append(model(**batch).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2]) and not torch.equal(logits[0], logits[3])


def test_a_plan_says_what_stands_for_the_question() -> None:
    plan = token_pruner("cdpruner").calibrate(vision_model("llava"), [])
    assert "embeddings of the language model" in plan.facts["question"]


def test_a_picture_that_is_no_number_stops_the_run() -> None:
    model, batch = vision_model("llava"), pictures("llava", 1).batch()
    with (
        pruned(model, token_pruner("cdpruner"), batch),
        torch.no_grad(),
        pytest.raises(QualityError, match="cdpruner: a feature of a visual token"),
    ):
        model(**batch | {"pixel_values": torch.full_like(batch["pixel_values"], torch.nan)})
