"""Counts are exact: the floor of the decimal number the user wrote."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structprune.calibration.statistics import InputSums, Statistics
from structprune.decide.budgets.owl import Owl
from structprune.decide.budgets.ramp import Ramp
from structprune.decide.budgets.table import Table
from structprune.decide.budgets.target_params import TargetParams
from structprune.decide.counts import apportion, removed_count, removed_weights
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


class TestApportion:
    def test_floors_come_first_and_the_largest_remainders_get_the_rest(self) -> None:
        wanted = {"a": Fraction(25, 10), "b": Fraction(34, 10), "c": Fraction(41, 10)}  # sums to 10
        assert apportion(10, wanted, dict.fromkeys(wanted, 100)) == {"a": 3, "b": 3, "c": 4}

    def test_a_tie_goes_to_the_first(self) -> None:
        wanted = {"a": Fraction(1, 2), "b": Fraction(1, 2)}
        assert apportion(1, wanted, {"a": 9, "b": 9}) == {"a": 1, "b": 0}

    def test_only_proportions_bind_and_the_total_is_exact(self) -> None:
        wanted = {"a": Fraction(1), "b": Fraction(2), "c": Fraction(4)}
        assert apportion(70, wanted, dict.fromkeys(wanted, 100)) == {"a": 10, "b": 20, "c": 40}

    def test_what_a_small_matrix_cannot_give_the_others_do(self) -> None:
        wanted = {"small": Fraction(50), "large": Fraction(50)}
        assert apportion(60, wanted, {"small": 10, "large": 100}) == {"small": 9, "large": 51}

    @pytest.mark.parametrize("total", range(0, 60, 7))
    def test_every_total_is_met(self, total: int) -> None:
        wanted = {"a": Fraction(1, 3), "b": Fraction(2, 7), "c": Fraction(5, 11), "d": Fraction(0)}
        sizes = {"a": 11, "b": 29, "c": 23, "d": 5}
        counts = apportion(total, wanted, sizes)
        assert sum(counts.values()) == total
        assert all(0 <= counts[name] < sizes[name] for name in wanted)

    def test_everything_cannot_leave(self) -> None:
        with pytest.raises(UsageError, match="cannot remove 5 of 5"):
            apportion(5, {"a": Fraction(1)}, {"a": 5})


class TestOwl:
    def test_the_outliers_of_a_block_are_counted_against_its_own_mean(self) -> None:
        weight = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 33.0]])  # the mean is 5
        assert Owl(outlier=5.0).measure([weight], [norms(torch.ones(4))]) == 1 / 8

    def test_activations_weigh_in(self) -> None:
        stat = norms(torch.tensor([1.0, 1.0, 1.0, 33.0]))
        assert Owl(outlier=5.0).measure([torch.ones(1, 4)], [stat]) == 0
        assert Owl(outlier=3.0).measure([torch.ones(1, 4)], [stat]) == 1 / 4

    def test_the_range_is_twice_the_spread_and_the_mean_is_what_was_asked(self) -> None:
        shares = Owl(spread=0.08).shares(Fraction(7, 10), measured(0.01, 0.02, 0.05, 0.05))
        assert max(shares) - min(shares) == Fraction(16, 100)
        assert sum(shares) / 4 == Fraction(7, 10)
        assert shares[0] == max(shares)  # fewest outliers, most removed

    def test_equal_blocks_get_equal_shares(self) -> None:
        assert Owl().shares(Fraction(1, 2), measured(0.3, 0.3)) == [Fraction(1, 2)] * 2


def test_a_ramp_rises_in_equal_steps_through_the_asked_share() -> None:
    assert Ramp(spread=0.1).shares(Fraction(1, 2), measured(0, 0, 0)) == [
        Fraction(4, 10),
        Fraction(5, 10),
        Fraction(6, 10),
    ]


def test_a_table_must_fit_the_blocks() -> None:
    assert Table(blocks=(0.25, 0.75)).shares(Fraction(1, 2), measured(0, 0)) == [
        Fraction(1, 4),
        Fraction(3, 4),
    ]
    with pytest.raises(UsageError, match="2 numbers for 3 blocks"):
        Table(blocks=(0.25, 0.75)).shares(Fraction(1, 2), measured(0, 0, 0))


class TestTargetParams:
    def test_what_is_not_pruned_counts_too(self) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(4, 5, bias=False), torch.nn.Linear(5, 2))  # 20 + 12
        assert TargetParams(parameters=25).total(20, 0.5, model) == 7

    @pytest.mark.parametrize("parameters", [12, 33])
    def test_what_cannot_be_left_is_refused_with_the_range(self, parameters: int) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(4, 5, bias=False), torch.nn.Linear(5, 2))
        with pytest.raises(UsageError, match="between 13 and 32"):
            TargetParams(parameters=parameters).total(20, 0.5, model)


def measured(*values: float) -> list[torch.Tensor]:
    """Return what a budget remembers of as many blocks."""
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def norms(values: torch.Tensor) -> Statistics:
    """Return the statistics of one token of these values."""
    sums = InputSums(frozenset({"norm"}), len(values), torch.device("cpu"))
    sums.add(values[None])
    return Statistics(sums)
