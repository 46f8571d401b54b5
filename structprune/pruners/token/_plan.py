"""What a plan may say of tokens."""

from collections.abc import Mapping, Sequence
from math import inf

import torch
from torch import Tensor

from structprune.errors import InputError
from structprune.plan.plan import Plan
from structprune.runtime.drop import left_of


def said_of(left: float, power: float = 1.0) -> Tensor:
    """Return what a plan says where so much is left at the end, and a power of it here.

    Args:
        left: A count, or a share of an image's tokens.
        power: Of the share, how much of it is left here.

    Returns:
        A count, or a share, or a count and the power: the share depends on the image then.
    """
    if not isinstance(left, int):
        return torch.tensor(left**power, dtype=torch.float64)
    return torch.tensor(left) if power == 1 else torch.tensor([left, power], dtype=torch.float64)


def counts_of(found: Mapping[int, Tensor], blocks: int, size: int, *, within: bool) -> list[tuple[int, int]]:
    """Return of every block how many tokens of an image its attention and its feed-forward compute.

    Args:
        found: Of the blocks where tokens are dropped how many are left, as a plan says it.
        blocks: How many there are.
        size: Tokens of the image.
        within: Whether they go between attention and feed-forward.
    """
    counts, now = [], size
    for index in range(blocks):
        after = int(left_of(found[index], torch.tensor(size))) if index in found else now
        counts.append((now, after) if within else (after, after))
        now = after
    return counts


def check_tokens(plan: Plan, blocks: Sequence[str]) -> None:
    """Check that a plan leaves what an image of a model can have.

    Args:
        plan: Whose tokens are looked at.
        blocks: Paths of the model's blocks.

    Raises:
        InputError: It names another block, or leaves no token, or more than all.
    """
    for key in plan:
        if key.kind != "tokens":
            continue
        if key.name not in blocks:
            raise InputError(
                f"plan key {str(key)!r}: no such block, the model has {blocks[0]} to {blocks[-1]}",
                hint="the plan belongs to another model",
            )
        tokens = plan[key]
        if not _says_tokens(tokens):
            raise InputError(
                f"plan key {str(key)!r}: leaves {tokens.tolist()}, expected a number of tokens from 1, or a "
                "share above 0 and at most 1, or a number and a power of that kind",
                hint="the plan is damaged: prune again with its recipe",
            )


def _says_tokens(tokens: Tensor) -> bool:
    """Tell whether a number, a share, or a number and the power of the share that it makes."""
    values = tokens.flatten().tolist()
    if not tokens.is_floating_point():
        return len(values) == 1 and values[0] >= 1
    if len(values) == 2:
        return tokens.ndim == 1 and 1 <= values[0] < inf and 0 < values[1] <= 1
    return len(values) == 1 and 0 < values[0] <= 1
