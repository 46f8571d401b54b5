"""Masks equal a stable ranking on (score, index), with exact counts, whatever the scores look like."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from structprune.decide import select
from structprune.decide.select import mask_groups, mask_matrix, mask_rows
from structprune.errors import QualityError, UsageError

PATTERNS = [
    (1, 2),
    (1, 4),
    (2, 4),
    (3, 4),
    (2, 8),
    (4, 8),
    (5, 6),
    (8, 16),
    (1, 32),
    (16, 32),
    (31, 32),
    (20, 64),
]


def ranked(scores: Tensor, removed: int) -> Tensor:
    """The reference: sort each row stably, remove the first."""
    order = np.argsort(scores.double().numpy(), axis=-1, kind="stable")
    mask = np.ones(scores.shape, dtype=bool)
    np.put_along_axis(mask, order[..., :removed], False, axis=-1)
    return torch.from_numpy(mask)


def ranked_groups(scores: Tensor, kept: int, of: int) -> Tensor:
    return ranked(scores.reshape(-1, of), of - kept).reshape(scores.shape)


def samples(shape: tuple[int, int]) -> dict[str, Tensor]:
    """Scores of every kind that has gone wrong somewhere."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(shape, generator=generator)
    choice = torch.randint(0, 3, shape, generator=generator)
    return {
        "random": normal,
        "double": normal.double(),
        "bfloat16": normal.abs().bfloat16(),
        "float16": normal.abs().half(),
        "bfloat16 derived": normal.abs().bfloat16().float(),
        "heavily tied": choice.float(),
        "constant": torch.full(shape, 0.5),
        "signed zeros": torch.where(choice > 1, 0.0, -0.0),
        "infinite": torch.tensor([-torch.inf, 0.0, torch.inf])[choice],
        "ascending": torch.arange(shape[0] * shape[1]).reshape(shape).float(),
        "descending": -torch.arange(shape[0] * shape[1]).reshape(shape).float(),
        "transposed": normal.T.contiguous().T,
        "every second": normal.repeat_interleave(2, dim=1)[:, ::2],
    }


KINDS = list(samples((1, 2)))

SCORES = torch.tensor(
    [
        [3.0, 1.0, 2.0, 4.0, 8.0, 7.0, 6.0, 5.0],
        [1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 0.0, 2.0],
        [0.0, -0.0, 5.0, 0.0, torch.inf, 1.0, -torch.inf, 1.0],
        [9.0, 9.0, 1.0, 9.0, 2.0, 2.0, 9.0, 2.0],
    ]
)


def bits(mask: Tensor) -> list[str]:
    return ["".join("1" if kept else "0" for kept in row) for row in mask.tolist()]


def test_two_of_four_by_hand() -> None:
    assert bits(mask_groups(SCORES, 2, 4)) == ["10011100", "00110101", "00111001", "01010011"]


def test_one_and_three_of_four_by_hand() -> None:
    assert bits(mask_groups(SCORES, 1, 4)) == ["00011000", "00010001", "00101000", "00010010"]
    assert bits(mask_groups(SCORES, 3, 4)) == ["10111110", "01110111", "01111101", "11010111"]


def test_half_of_every_row_by_hand() -> None:
    assert bits(mask_rows(SCORES, 4)) == ["00001111", "00110101", "00101101", "11010010"]


def test_half_of_the_matrix_by_hand() -> None:
    # 14 scores are below 2, so two of the six twos leave: the first ones in row order.
    assert bits(mask_matrix(SCORES, 16)) == ["10011111", "00000001", "00101000", "11011111"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("kept", "of"), PATTERNS)
def test_groups_equal_the_stable_ranking(kind: str, kept: int, of: int) -> None:
    scores = samples((5, of * 3))[kind]
    assert torch.equal(mask_groups(scores, kept, of), ranked_groups(scores, kept, of))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("removed", [0, 1, 13, 36, 71, 72])
def test_rows_and_matrix_equal_the_stable_ranking(kind: str, removed: int) -> None:
    scores = samples((5, 72))[kind]
    assert torch.equal(mask_rows(scores, removed), ranked(scores, removed))
    wanted = ranked(scores.reshape(1, -1), removed * 5).reshape(5, 72)
    assert torch.equal(mask_matrix(scores, removed * 5), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_piece_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "CPU_PIECE", 50)
    scores = samples((7, 24))[kind]
    assert torch.equal(mask_groups(scores, 2, 4), ranked_groups(scores, 2, 4))
    assert torch.equal(mask_rows(scores, 11), ranked(scores, 11))
    # A matrix is one row of many windows here, and its surplus ties end in the middle of one.
    for removed in (0, 1, 49, 50, 51, 84, 149, 168):
        assert torch.equal(
            mask_matrix(scores, removed), ranked(scores.reshape(1, -1), removed).reshape(7, 24)
        )


small = st.sampled_from([-torch.inf, -1.0, -0.0, 0.0, 0.5, 1.0, torch.inf])


@given(st.data())
def test_any_small_matrix_equals_the_stable_ranking(data: st.DataObject) -> None:
    of = data.draw(st.integers(1, 32))
    kept = data.draw(st.integers(0, of))
    out, width = data.draw(st.integers(0, 4)), of * data.draw(st.integers(0, 3))
    values = data.draw(
        st.lists(small | st.floats(width=32, allow_nan=False), min_size=out * width, max_size=out * width)
    )
    scores = torch.tensor(values, dtype=torch.float32).reshape(out, width)
    removed = data.draw(st.integers(0, width))
    mask = mask_groups(scores, kept, of)
    assert torch.equal(mask, ranked_groups(scores, kept, of))
    assert mask.view(-1, of).sum(1).eq(kept).all()
    assert torch.equal(mask_rows(scores, removed), ranked(scores, removed))
    assert mask_rows(scores, removed).logical_not().sum(1).eq(removed).all()
    wanted = ranked(scores.reshape(1, -1), removed * out).reshape(out, width)
    assert torch.equal(mask_matrix(scores, removed * out), wanted)


def test_an_ordinary_bfloat16_matrix_has_exact_counts() -> None:
    scores = torch.randn(64, 1000, generator=torch.Generator().manual_seed(1)).abs().bfloat16()
    assert mask_rows(scores, 290).sum(1).eq(710).all()
    assert int(mask_matrix(scores, 12345).logical_not().sum()) == 12345
    assert mask_groups(scores, 4, 8).view(-1, 8).sum(1).eq(4).all()


@pytest.mark.parametrize("where", [0, 17, 47])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_score_that_is_nan_is_refused(where: int, dtype: torch.dtype) -> None:
    scores = torch.full((3, 16), torch.inf, dtype=dtype)
    scores.view(-1)[where] = torch.nan
    with pytest.raises(QualityError, match=r"NaN in rows 0 to 2 of \[3, 16\]"):
        mask_groups(scores, 2, 4)
    with pytest.raises(QualityError, match="NaN"):
        mask_rows(scores, 0)
    with pytest.raises(QualityError, match="NaN"):
        mask_matrix(scores, 5)


def test_a_group_size_that_does_not_divide_is_refused_with_the_shape() -> None:
    with pytest.raises(UsageError, match=r"shape \[3, 6\]"):
        mask_groups(torch.zeros(3, 6), 2, 4)


def test_an_impossible_count_is_a_mistake_of_the_caller() -> None:
    for wrong in (lambda: mask_rows(torch.zeros(2, 4), 5), lambda: mask_matrix(torch.zeros(2, 4), -1)):
        with pytest.raises(ValueError, match="cannot remove"):
            wrong()
    with pytest.raises(ValueError, match="cannot keep"):
        mask_groups(torch.zeros(2, 4), 5, 4)


def test_scores_that_require_a_gradient_are_only_read() -> None:
    scores = torch.randn(4, 8, requires_grad=True)
    before = scores.detach().clone()
    assert torch.equal(mask_rows(scores, 3), ranked(scores.detach(), 3))
    assert torch.equal(mask_groups(scores, 2, 4), ranked_groups(scores.detach(), 2, 4))
    assert torch.equal(scores.detach(), before)


def test_the_lines_for_an_accelerator_select_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the torch spelling of the arithmetic on the CPU, with a tensor where a NumPy piece would be."""
    scores = samples((6, 48))["heavily tied"]
    mask = torch.empty(scores.shape, dtype=torch.bool)
    select._keep_highest(scores, 20, mask)
    assert torch.equal(mask, ranked(scores, 20))
    monkeypatch.setattr(select, "CPU_PIECE", 7)
    select._keep_highest(scores, 20, mask)
    assert torch.equal(mask, ranked(scores, 20))
    place = torch.arange(4, dtype=torch.uint8).repeat(scores.numel() // 4)
    rank = select._rank(scores.reshape(-1), 3 - place, [place < 4 - shift for shift in (1, 2, 3)])
    assert torch.equal((rank >= 2).reshape(scores.shape), ranked_groups(scores, 2, 4))
