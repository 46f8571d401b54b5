"""The parts of recovery by hand: the masked change, its gradient, the losses, the rate, the windows."""

import math
from pathlib import Path

import pytest
import torch

from structprune.calibration.text_source import TextSource
from structprune.checkpoint.adapter import (
    LowRankChange,
    add_masked,
    merge,
    round_kept,
)
from structprune.errors import InputError
from structprune.recovery.masked_lora import MaskedProduct
from structprune.recovery.objective import divergence, learning_rate
from structprune.recovery.windows import draw, split_off
from tests.recovering import LENGTH
from tests.tiny import tokenizer


def test_a_change_reaches_only_the_weights_that_are_not_zero() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    factors = LowRankChange(torch.tensor([[1.0], [3.0]]), torch.tensor([[10.0, 20.0]]), scaling=0.5)
    assert factors.delta().tolist() == [[5.0, 10.0], [15.0, 30.0]]
    assert merge(weight, factors).tolist() == [[6.0, 0.0], [0.0, 28.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kept_weight_that_meets_zero_is_not_counted_as_removed(dtype: torch.dtype) -> None:
    weight = torch.tensor([0.5, -0.5, 0.0])
    stored = round_kept(add_masked(weight, -weight), weight, dtype)
    assert (stored != 0).tolist() == [True, True, False]
    assert stored.abs().max() < 1e-4
    assert stored.dtype == dtype


def test_the_layer_has_the_gradients_that_autograd_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in [(2, 3, 4), (5, 4), (2, 4), (5, 2)]
    )
    frozen = (weight.detach() * (torch.rand(5, 4, generator=generator) > 0.5)).requires_grad_(False)
    assert torch.autograd.gradcheck(
        lambda inputs, a, b: MaskedProduct.apply(inputs, frozen, a, b, 0.7), (inputs, a, b)
    )


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    rates = [learning_rate(step, steps=6, warmup=2, peak=1.0) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_distillation_is_zero_against_itself_and_the_divergence_by_hand_otherwise() -> None:
    ours, theirs = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    assert divergence(theirs, theirs, 2.0).item() == pytest.approx(0.0, abs=1e-7)
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert divergence(ours, theirs, 1.0).item() == pytest.approx(by_hand, abs=1e-6)


def test_held_out_windows_are_never_trained_on() -> None:
    windows = torch.arange(50).view(-1, 1).expand(50, LENGTH)
    training, held_out = split_off(windows, 0.1, seed=3)
    assert (len(training), len(held_out)) == (45, 5)
    assert sorted([*training[:, 0].tolist(), *held_out[:, 0].tolist()]) == list(range(50))
    assert not torch.equal(held_out, split_off(windows, 0.1, seed=4)[1])


def test_windows_are_as_many_as_asked_or_as_there_are(tmp_path: Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("a quick brown fox. " * 100, encoding="utf-8")
    few = draw(TextSource(str(text)), tokenizer(), limit=3, length=16)
    every = draw(TextSource(str(text)), tokenizer(), limit=10_000, length=16)
    assert few.ids.shape == (3, 16)
    assert every.facts["windows"] == every.facts["tokens_available"] // 16 == len(every.ids)


def test_too_little_text_says_how_much_there_is(tmp_path: Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("a quick brown fox", encoding="utf-8")
    with pytest.raises(InputError, match=r"\d+ tokens are too few: recovery needs at least 2 windows of 64"):
        draw(TextSource(str(text)), tokenizer(), limit=8, length=64)
