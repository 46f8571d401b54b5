"""What a plan may say of tokens."""

from collections.abc import Sequence

from structprune.errors import InputError
from structprune.plan.plan import Plan


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
        share = tokens.is_floating_point()
        if tokens.numel() != 1 or not (0 < float(tokens) <= 1 if share else int(tokens) >= 1):
            raise InputError(
                f"plan key {str(key)!r}: leaves {tokens.tolist()}, expected a number of tokens from 1, or a "
                "share above 0 and at most 1",
                hint="the plan is damaged: prune again with its recipe",
            )
