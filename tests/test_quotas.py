"""A count divided among parts: by weight, exactly, never more than there is room for."""

import pytest
import torch

from structprune.decide.quotas import quotas


@pytest.mark.parametrize(
    ("weights", "room", "total", "expected"),
    [
        ([1, 1, 1, 1], [9, 9, 9, 9], 8, [2, 2, 2, 2]),
        # 10 / 4 = 2.5 each: of equal remainders the first two.
        ([1, 1, 1, 1], [9, 9, 9, 9], 10, [3, 3, 2, 2]),
        # 6.4, 2.4 and 1.2: the one left over goes to where 0.4 was lost, of equal ones the first.
        ([0.64, 0.24, 0.12], [9, 9, 9], 10, [7, 2, 1]),
        # 8 do not fit: 5 of them go to the others, 2 : 1.
        ([8, 2, 1], [3, 9, 9], 11, [3, 5, 3]),
        ([1, 0, 0], [2, 5, 5], 4, [2, 1, 1]),
        ([0, 0], [3, 3], 3, [2, 1]),
        # 0.29 of 100 is 29, though their product is 28.999999999999996.
        ([0.29, 0.71], [100, 100], 100, [29, 71]),
        ([5, 5], [0, 4], 4, [0, 4]),
        ([5, 5], [4, 4], 0, [0, 0]),
    ],
)
def test_quotas_by_hand(weights: list[float], room: list[int], total: int, expected: list[int]) -> None:
    found = quotas(torch.tensor([weights]), torch.tensor([room]), torch.tensor([total]))
    assert found.tolist() == [expected]


def test_quotas_add_up_and_fit_and_images_do_not_see_each_other() -> None:
    draw = torch.Generator().manual_seed(0)
    weights = torch.rand(200, 7, generator=draw) ** 4
    room = torch.randint(0, 9, (200, 7), generator=draw)
    total = (room.sum(1) * torch.rand(200, generator=draw)).long()
    found = quotas(weights, room, total)
    assert torch.equal(found.sum(1), total) and bool((found <= room).all()) and bool((found >= 0).all())
    alone = [quotas(*(one[row : row + 1] for one in (weights, room, total))) for row in range(200)]
    assert torch.equal(torch.cat(alone), found)
