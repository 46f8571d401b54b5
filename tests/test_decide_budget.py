"""Counts are exact: the floor of the decimal number the user wrote."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structprune.decide.budget import removed_count, removed_weights, uniform
from structprune.errors import UsageError


@pytest.mark.parametrize(
    ("total", "sparsity", "removed"),
    [
        (100, 0.29, 29),
        (100, 0.57, 57),
        (1000, 0.5, 500),
        (7, 0.5, 3),
        (10, 0.999, 9),
        (10, 0.0, 0),
        (0, 0.5, 0),
    ],
)
def test_the_count_is_the_exact_floor(total: int, sparsity: float, removed: int) -> None:
    assert removed_count(total, sparsity) == removed


def test_a_pattern_and_a_fraction_count_too() -> None:
    assert removed_count(16, "1:4") == 12
    assert removed_count(9, Fraction(1, 3)) == 3


@given(st.integers(0, 10**12), st.integers(0, 99))
def test_whole_percentages_count_like_integers(total: int, percent: int) -> None:
    assert removed_count(total, percent / 100) == total * percent // 100


def test_what_a_matrix_can_lose_depends_on_where_the_floor_is_taken() -> None:
    assert removed_weights((4, 7), 0.5, "row") == 4 * 3
    assert removed_weights((4, 7), 0.5, "matrix") == 14
    assert removed_weights((4, 8), "1:4") == 24
    assert removed_weights((4, 8), "3:4", "matrix") == 8


def test_a_pattern_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"shape \[4, 6\]"):
        removed_weights((4, 6), "2:4")


def test_a_uniform_budget_gives_every_linear_the_same() -> None:
    assert uniform(["a", "b"], "2:4") == {"a": "2:4", "b": "2:4"}
