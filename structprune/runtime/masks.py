"""What each kept token may see: a model's mask, narrowed to what a block computes and its cache holds.

The model makes its mask once, for all tokens, in the form of its attention kernel: bool or float
[batch, 1, queries, columns], [batch, columns] for kernels that take lengths, or None where plain causal order
is all there is.
"""

import torch
from torch import Tensor

from structprune.errors import UsageError
from structprune.runtime.keep_set import gather


def narrow(
    mask: object, rows: Tensor, columns: Tensor, valid: Tensor, *, past: int, even: bool
) -> Tensor | None:
    """Return the mask of a block.

    Args:
        mask: What the model gave, about all logical columns.
        rows: Places in this forward of the tokens that the block computes, shape [batch, queries].
        columns: Logical columns of its keys, those of this forward last, shape [batch, keys].
        valid: Whether each key may be seen, shape [batch, keys].
        past: Logical length before this forward.
        even: Whether all of them are.

    Raises:
        UsageError: The kernel's mask is of a kind that cannot be narrowed.
    """
    if mask is None:
        if even and (past == 0 or rows.shape[1] == 1):
            return None
        return (columns[:, None, None, :] <= past + rows[:, None, :, None]) & valid[:, None, None, :]
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise UsageError(
            f"an attention mask of kind {type(mask).__name__} cannot lose tokens",
            hint="open the model with attn_implementation='sdpa' or 'eager'",
        )
    if mask.ndim == 2:
        return gather(mask, columns) * valid.to(mask.dtype)
    found = gather(gather(mask, rows, 2), columns, 3)
    if even:
        return found
    hidden = False if found.dtype == torch.bool else torch.finfo(found.dtype).min
    return found.masked_fill(~valid[:, None, None, :], hidden)
