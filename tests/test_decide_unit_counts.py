"""How many units leave, worked out by hand."""

import torch

from structprune.decide.unit_counts import (
    Multiples,
    UnitCosts,
    UnitCounts,
    global_counts,
    legal_counts,
    uneven_counts,
    uniform_counts,
)

THERE, COSTS = UnitCounts(4, 10), UnitCosts(30, 4)  # 120 + 40 parameters
CHANNELS = UnitCosts(0, 4)


def test_channels_make_up_for_what_groups_round_away():
    # 0.2 of 160 are 32: the nearest number of groups is 3, which is 30; half a channel is left over.
    assert uniform_counts(THERE, COSTS, 0.2) == UnitCounts(3, 10)
    # 0.3 are 48: one group is 30, four channels 16, and 46 is as near as 50; more stay.
    assert uniform_counts(THERE, COSTS, 0.3) == UnitCounts(3, 6)


def test_a_multiple_that_is_not_reached_stays_whole():
    assert uniform_counts(THERE, CHANNELS, 0.3, Multiples(1, 4)) == UnitCounts(4, 8)
    assert uniform_counts(THERE, CHANNELS, 0.3, Multiples(1, 16)) == UnitCounts(4, 10)


def test_what_one_block_could_not_lose_the_next_one_loses():
    # 0.25 of ten channels are two and a half: 8, then 7, by turns.
    stay = uneven_counts([0.25] * 4, [THERE] * 4, [CHANNELS] * 4)
    assert [one.channels for one in stay] == [8, 7, 8, 7]
    assert uneven_counts([0.0, 0.5], [THERE] * 2, [UnitCosts(), CHANNELS]) == [THERE, UnitCounts(4, 5)]


def test_units_of_all_blocks_leave_by_their_scores_until_enough_has_left():
    first = {"kv_group": torch.tensor([1.0, 9, 9, 9]), "channel": torch.arange(10) + 2.0}
    second = {"kv_group": torch.full((4,), 20.0), "channel": torch.full((10,), 20.0)}
    # 0.1 of 320 are 32: the group with score 1, then half a channel is too little for another one.
    assert global_counts([first, second], [THERE] * 2, [COSTS] * 2, 0.1) == [UnitCounts(3, 10), THERE]
    # 0.15 are 48: 30, and four channels of 4 are 46; a fifth would be 50.
    assert global_counts([first, second], [THERE] * 2, [COSTS] * 2, 0.15) == [UnitCounts(3, 6), THERE]


def test_a_unit_that_is_too_large_makes_way_for_smaller_ones():
    scores = {"kv_group": torch.tensor([1.0, 9, 9, 9]), "channel": torch.arange(10) + 2.0}
    # 0.05 of 160 are 8: a group of 30 would lead away from that, two channels are just that.
    assert global_counts([scores], [THERE], [COSTS], 0.05) == [UnitCounts(4, 8)]


def test_between_two_multiples_units_leave_together():
    scores = {"channel": torch.arange(10.0)}
    stay = [
        global_counts([scores], [THERE], [CHANNELS], share, Multiples(1, 4)) for share in (0.1, 0.2, 0.6, 0.9)
    ]
    assert [one.channels for (one,) in stay] == [10, 8, 4, 4]
    assert global_counts([scores], [THERE], [CHANNELS], 0.9, Multiples(1, 16)) == [THERE]


def test_the_last_unit_of_a_kind_never_leaves():
    scores = {"kv_group": torch.zeros(4), "channel": torch.zeros(10)}
    assert global_counts([scores], [THERE], [COSTS], 0.999) == [UnitCounts(1, 1)]


def test_what_can_stay():
    assert legal_counts(96, 64) == [64]
    assert legal_counts(128, 64) == [64]
    assert legal_counts(96, 128) == []
    assert legal_counts(3, 1) == [2, 1]
    assert legal_counts(1, 1) == []
