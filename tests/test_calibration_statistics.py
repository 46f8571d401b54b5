"""Running statistics: sums over tokens that do not depend on how tokens arrive."""

import pytest
import torch
from torch import Tensor

from structprune.calibration.statistics import PANEL, InputSums, Part, Parts, Statistics, gradient_means

CPU = torch.device("cpu")
ALL: Parts = frozenset({"norm", "moments", "gram"})
# Two whole panels and a bit.
WIDE = 2 * PANEL + 3


def seen(inputs: Tensor, *pieces: int, parts: Parts = ALL) -> InputSums:
    """Return what is remembered of inputs that arrive in pieces."""
    statistic = InputSums(parts, inputs.shape[1], CPU)
    for piece in torch.split(inputs, list(pieces) or [len(inputs)]):
        statistic.add(piece)
    return statistic


def test_sums_by_hand() -> None:
    statistic = seen(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
    assert statistic.tokens == 2
    assert statistic.norm.tolist() == pytest.approx([10**0.5, 20**0.5])
    assert statistic.mean.tolist() == [2.0, -1.0]
    assert statistic.variance.tolist() == [1.0, 9.0]
    assert statistic.gram.tolist() == [[10.0, -10.0], [-10.0, 20.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gram_matrix_of_several_panels_is_whole(dtype: torch.dtype) -> None:
    inputs = torch.randn(40, WIDE, generator=torch.Generator().manual_seed(0)).to(dtype)
    gram = seen(inputs).gram
    exact = inputs.double().T @ inputs.double()
    torch.testing.assert_close(gram.double(), exact, rtol=1e-5, atol=1e-4)
    # The part below the panels is a copy, not a second sum.
    assert torch.equal(gram[PANEL:, :PANEL], gram[:PANEL, PANEL:].T)


def test_in_which_order_batches_are_added_does_not_show_in_a_gram_matrix() -> None:
    batches = torch.randn(6, 40, WIDE, generator=torch.Generator().manual_seed(0))
    one, other = seen(batches.flatten(0, 1), *[40] * 6), seen(batches.flip(0).flatten(0, 1), *[40] * 6)
    assert torch.equal(one.gram, other.gram)


def test_a_gram_matrix_that_was_read_takes_no_more_tokens() -> None:
    statistic = seen(torch.ones(2, 4))
    assert statistic.gram is statistic.gram
    with pytest.raises(AssertionError):
        statistic.add(torch.ones(2, 4))


def test_two_processes_add_up_to_one() -> None:
    inputs = torch.randint(-3, 4, (12, WIDE), generator=torch.Generator().manual_seed(0)).float()
    first, second, whole = seen(inputs[:5]), seen(inputs[5:]), seen(inputs, 3, 9)
    first.merge(second)
    assert first.tokens == whole.tokens
    assert torch.equal(first.gram, whole.gram)
    assert torch.equal(first.squares, whole.squares)
    assert torch.equal(first.sums, whole.sums)


def test_every_part_is_the_same_whatever_stands_beside_it() -> None:
    inputs = torch.randn(1500, WIDE, generator=torch.Generator().manual_seed(0)) + 3
    norm, moments, gram = (seen(inputs, parts=frozenset({part})) for part in sorted(ALL, reverse=True))
    whole = seen(inputs)
    assert torch.equal(whole.norm, norm.norm)
    assert torch.equal(whole.mean, moments.mean) and torch.equal(whole.variance, moments.variance)
    assert torch.equal(whole.gram, gram.gram)
    torch.testing.assert_close(whole.mean, inputs.mean(dim=0, dtype=torch.float64).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.variance, inputs.double().var(dim=0, correction=0).float())


READS: dict[Part, str] = {"norm": "norm", "moments": "variance", "gram": "gram"}


@pytest.mark.parametrize("part", READS)
def test_a_part_that_nobody_declared_is_an_error_that_says_so(part: Part) -> None:
    others = Statistics(seen(torch.ones(2, 4), parts=ALL - {part}))
    with pytest.raises(LookupError, match=f"'{part}' was not collected"):
        getattr(others, READS[part])
    with pytest.raises(LookupError, match="nothing was collected"):
        getattr(Statistics(), READS[part])
    with pytest.raises(LookupError, match="no gradient was collected"):
        _ = others.gradient


def test_who_needs_a_gram_matrix_alone_pays_for_no_means() -> None:
    sums = seen(torch.ones(2, 4), parts=frozenset({"gram"}))
    assert sums.squares.numel() == sums.sums.numel() == 0
    assert sums.tokens == 2


def test_the_parts_say_how_gradients_are_added_up() -> None:
    assert gradient_means(frozenset({"norm", "gradient_l2"})) == ("l2",)
    assert gradient_means(frozenset({"norm"})) == ()
    assert gradient_means(frozenset({"gradient_l2", "gradient"})) == ("signed", "l2")
