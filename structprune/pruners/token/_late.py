"""Methods that drop visual tokens before one block, after others have computed all of them."""

from typing import Annotated

from pydantic import Field

from structprune.errors import UsageError
from structprune.pruners.token._family import TokenPruner


class LateTokens(TokenPruner):
    """A pruner that looks at what the first blocks made of the tokens.

    Args:
        block: Number of blocks that compute all tokens.
    """

    block: Annotated[int, Field(ge=1)] = 2

    def start(self, blocks: int) -> int:
        """Return the block before which tokens are dropped.

        Raises:
            UsageError: The model has no such block.
        """
        return checked(self.block, blocks)


def checked(block: int, blocks: int) -> int:
    """Return the number of blocks that compute all tokens, where others are left to save in.

    Args:
        block: How many compute all tokens.
        blocks: How many the model has.

    Raises:
        UsageError: None is left.
    """
    if block >= blocks:
        raise UsageError(
            f"block: {block} of a model with {blocks} blocks leaves no block to save in",
            hint=f"block can be from 1 to {blocks - 1}",
        )
    return block
