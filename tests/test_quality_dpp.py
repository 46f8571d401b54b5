"""Quality DPP: stages, the kernel worked out token by token, and what each of its parts is for."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from structprune.decide.token_target import Target, counts_at
from structprune.errors import QualityError, UsageError
from structprune.pruners.token.quality_dpp import LEAST
from structprune.runtime.flops import BlockCost
from tests.oracle import pictures, pruned, token_pruner
from tests.pictures import vision_model

# LLaVA-1.5-7B, and the demo.
VICUNA, DEMO = BlockCost(4096, 4096, 4096, 11008), BlockCost(128, 128, 64, 352)


@dataclass
class Seen:
    """What the method sees of images: states, attention of the last token, and words of the text."""

    states: Tensor
    attention: Tensor
    words: Tensor
    real: Tensor

    @property
    def left(self) -> Tensor:
        return self.real.sum(1)

    def features(self) -> Tensor:
        return self.states * self.real[..., None]

    def paid_by_last(self) -> Tensor:
        return self.attention * self.real

    def text(self) -> tuple[Tensor, Tensor]:
        return self.words, torch.ones(self.words.shape[:2], dtype=torch.bool)


def _seen(seed: int = 0, sizes: tuple[int, ...] = (14, 9), shift: float = 2.0) -> Seen:
    dice, width = torch.Generator().manual_seed(seed), max(sizes)
    states = torch.randn(len(sizes), width, 16, generator=dice) + shift
    attention = torch.rand(len(sizes), width, generator=dice)
    words = torch.randn(len(sizes), 3, 16, generator=dice)
    return Seen(states, attention, words, torch.arange(width) < torch.tensor(sizes)[:, None])


def _chosen(seen: Seen, keep: int, **fields: Any) -> list[list[int]]:
    every: Any = seen
    found = token_pruner("quality_dpp", **fields).choose(every, torch.full((len(seen.real),), keep))
    return [one.nonzero().flatten().tolist() for one in found]


def _kernel(seen: Seen, image: int, attention: float, relevance: float, centring: float) -> Tensor:
    """Work a kernel out token by token, float64."""
    real = seen.real[image]
    states, words = seen.states[image, real].double(), seen.words[image].double()

    def scaled(scores: list[float]) -> list[float]:
        low, high = min(scores), max(scores)
        return [max((one - low) / (high - low), LEAST) for one in scores]

    cosine = torch.nn.functional.cosine_similarity
    paid = scaled(seen.attention[image, real].double().tolist())
    near = scaled([max(float(cosine(one, word, dim=0)) for word in words) for one in states])
    quality = [one**attention * two**relevance for one, two in zip(paid, near, strict=True)]
    own = states - centring * states.mean(0)
    rows = [
        [left * float(cosine(one, two, dim=0)) * right for two, right in zip(own, quality, strict=True)]
        for one, left in zip(own, quality, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _greedy(kernel: Tensor, keep: int) -> list[int]:
    """Try every token at every pick, and take the one with the largest determinant."""
    picks: list[int] = []
    for _ in range(keep):
        left = [one for one in range(len(kernel)) if one not in picks]
        parts = [kernel[[*picks, one]][:, [*picks, one]] for one in left]
        picks.append(left[int(torch.stack([part.det() for part in parts]).argmax())])
    return sorted(picks)


@pytest.mark.parametrize(
    ("attention", "relevance", "centring"), [(1.0, 0.5, 0.9), (2.0, 0.0, 0.0), (0.0, 1.0, 1.0)]
)
def test_tokens_that_stay_are_those_of_the_formula(
    attention: float, relevance: float, centring: float
) -> None:
    powers = (attention, relevance, centring)
    for seed in range(5):
        seen = _seen(seed)
        wanted = [_greedy(_kernel(seen, image, *powers), 5) for image in range(2)]
        named = dict(zip(("attention", "relevance", "centring"), powers, strict=True))
        assert _chosen(seen, 5, **named) == wanted


def test_centring_takes_away_what_all_tokens_share() -> None:
    for centring, same in ((1.0, True), (0.0, False)):
        pairs = [(_seen(seed, shift=0), _seen(seed, shift=100.0)) for seed in range(5)]
        found = [[_chosen(one, 5, centring=centring, relevance=0) for one in pair] for pair in pairs]
        assert all(near == far for near, far in found) == same


def test_without_diversity_the_highest_quality_stays() -> None:
    seen = _seen()
    found = _chosen(seen, 4, relevance=0.0, diversity=False)
    paid = seen.attention.masked_fill(~seen.real, -1)
    assert found == [sorted(one.topk(4).indices.tolist()) for one in paid]


def test_of_two_alike_one_goes_however_much_it_is_looked_at() -> None:
    seen = _seen(sizes=(6,), shift=0)
    seen.states[0, 1] = seen.states[0, 0]
    seen.attention[0] = torch.tensor([1.0, 0.99, 0.2, 0.15, 0.1, 0.05])
    assert _chosen(seen, 2, relevance=0.0, diversity=False) == [[0, 1]]
    assert 1 not in _chosen(seen, 5, relevance=0.0)[0]


def test_stages_stand_as_deep_as_those_of_transprune() -> None:
    pruner, other = token_pruner("quality_dpp"), token_pruner("transprune")
    for blocks in (4, 5, 28, 32, 40):
        assert [*pruner.stages(blocks)] == [*other.stages(blocks)]
        assert [*pruner.stages(blocks).values()] == pytest.approx([0.2, 0.5, 1.0])


@pytest.mark.parametrize("share", [1 / 3, 0.11, 0.05])
@pytest.mark.parametrize(("blocks", "size", "cost"), [(5, 144, DEMO), (32, 576, VICUNA)])
def test_stages_take_no_more_than_those_of_transprune_and_pyramiddrop(
    share: float, blocks: int, size: int, cost: BlockCost
) -> None:
    def taken(method: str) -> int:
        stages = token_pruner(method).stages(blocks)
        return sum(
            map(cost.operations, counts_at(Target(keep_ratio=share), size, stages, blocks, cost.operations))
        )

    assert taken("quality_dpp") <= min(taken("transprune"), taken("pyramiddrop"))


def test_a_block_makes_one_stage_of_them() -> None:
    assert token_pruner("quality_dpp", block=2).stages(5) == {2: 1.0}
    with pytest.raises(UsageError, match="block: 5 of a model with 5 blocks"):
        token_pruner("quality_dpp", block=5).stages(5)
    with pytest.raises(UsageError, match="a model with one block leaves no block to save in"):
        token_pruner("quality_dpp").stages(1)


@torch.no_grad()
def test_a_state_that_is_no_number_stops_the_run() -> None:
    model, batch = vision_model("llava"), pictures("llava", 1).batch()
    batch |= {"pixel_values": torch.full_like(batch["pixel_values"], torch.nan)}
    with (
        pruned(model, token_pruner("quality_dpp"), batch),
        pytest.raises(QualityError, match="quality_dpp: a feature of a visual token"),
    ):
        model(**batch)
