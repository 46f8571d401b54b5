"""From scores to masks: exact counts, ties settled by position, without sorting.

Every result equals a stable ranking on (score, index): the lowest score leaves first and, among equal scores,
the lower index. Nothing here sorts: a row needs only its threshold, a small group its pairwise comparisons.

The work goes through pieces that fit a core's cache: scores come from memory once, temporaries stay small. On
the CPU a piece is a NumPy array, because NumPy compares and partitions with the processor's vector
instructions, several times faster than torch's comparison and `kthvalue`; on an accelerator it is a torch
tensor. The arithmetic is spelled alike in both libraries, so it is written once; `Array` is either.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structprune.decide.counts import Compare
from structprune.decide.sparsity import check_groups
from structprune.errors import QualityError

Array = Any

# Scores per piece. A float32 piece of 256 KiB and its byte-sized temporaries stay in a 1 MiB level-2 cache.
CPU_PIECE = 1 << 16
# An accelerator wants work enough to hide its kernel launches; the temporaries stay below 1 GiB.
DEVICE_PIECE = 1 << 25
# A group of M costs M - 1 passes of comparisons; beyond this size one partition of each group is cheaper.
PAIRWISE_LIMIT = 16


def mask_rows(scores: Tensor, removed: int) -> Tensor:
    """Remove the `removed` lowest scores of every row.

    Args:
        scores: Shape [out, in], any float dtype; infinities allowed.
        removed: How many leave in each row, 0 to in.

    Returns:
        Mask, shape [out, in], bool, True = kept.

    Raises:
        QualityError: A score is NaN.
    """
    inputs = scores.shape[1]
    if not 0 <= removed <= inputs:
        raise ValueError(f"cannot remove {removed} of the {inputs} scores of a row")
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for piece, kept in _pieces(scores, mask):
        if 0 < removed < inputs:
            _keep_highest(piece, removed, kept)
        else:
            kept[:] = removed == 0
    return mask


def mask_matrix(scores: Tensor, removed: int) -> Tensor:
    """Remove the `removed` lowest scores of the whole matrix; the index of a weight counts row by row.

    Args:
        scores: Shape [out, in], any float dtype; infinities allowed.
        removed: How many leave, 0 to out * in.

    Returns:
        Mask, shape [out, in], bool, True = kept.

    Raises:
        QualityError: A score is NaN.
    """
    return mask_rows(scores.reshape(1, -1), removed).view(scores.shape)


def mask_groups(scores: Tensor, kept: int, of: int) -> Tensor:
    """Keep the `kept` highest of every `of` consecutive scores of a row.

    Args:
        scores: Shape [out, in], any float dtype; infinities allowed.
        kept: N of the pattern N:M, 0 to M.
        of: M of the pattern; it divides `in`.

    Returns:
        Mask, shape [out, in], bool, True = kept.

    Raises:
        UsageError: `in` does not divide into groups; the caller adds the tensor's name.
        QualityError: A score is NaN.
    """
    if not 0 <= kept <= of or of < 1:
        raise ValueError(f"cannot keep {kept} of every {of} scores")
    check_groups(tuple(scores.shape), of)
    if of > PAIRWISE_LIMIT:
        return mask_rows(scores.reshape(-1, of), of - kept).view(scores.shape)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    behind: Array = None
    for piece, out in _pieces(scores, mask):
        flat = piece.reshape(-1)
        if behind is None:  # the first piece is the longest
            behind = of - 1 - _places(scores.device, len(flat), of)
            inside = [behind >= shift for shift in range(1, of)]
        rank = _rank(flat, behind[: len(flat)] + 0, inside)
        library = np if isinstance(rank, np.ndarray) else torch
        library.greater_equal(rank, of - kept, out=out.reshape(-1))
    return mask


def mask_lowest(
    scores: Tensor, removed: int, *, pattern: tuple[int, int] | None = None, compare: Compare = "row"
) -> Tensor:
    """Remove exactly `removed` of a matrix's scores, the lowest of those that compete with each other.

    Args:
        scores: Shape [out, in], any float dtype; infinities allowed.
        removed: How many leave altogether; with a pattern it follows from it.
        pattern: (kept, of) where every `of` consecutive inputs compete; None for an unstructured choice.
        compare: Whether the weights of a row compete with each other, or all of the matrix.

    Returns:
        Mask, shape [out, in], bool, True = kept.

    Raises:
        QualityError: A score is NaN.
    """
    if pattern is not None:
        return mask_groups(scores, *pattern)
    if compare == "matrix":
        return mask_matrix(scores, removed)
    each, more = divmod(removed, scores.shape[0])
    mask = mask_rows(scores, each)
    if more:  # a budget's count need not divide among the rows: the first ones lose one more
        mask[:more] = mask_rows(scores[:more], each + 1)
    return mask


def _pieces(scores: Tensor, mask: Tensor) -> Iterator[tuple[Array, Array]]:
    """Yield whole rows of scores with the same rows of the mask, which is to be filled in place.

    Raises:
        QualityError: A score is NaN: it has no rank.
    """
    on_cpu = scores.device.type == "cpu"
    half = scores.element_size() < 4  # NumPy has no bfloat16 and no fast float16; float32 holds both exactly
    source: Array = scores.detach().numpy() if on_cpu and not half else scores.detach()
    target: Array = mask.numpy() if on_cpu else mask
    step = max(1, (CPU_PIECE if on_cpu else DEVICE_PIECE) // max(1, scores.shape[1]))
    for start in range(0, scores.shape[0] if scores.numel() else 0, step):
        piece, out = source[start : start + step], target[start : start + step]
        if half:
            piece = piece.float().numpy() if on_cpu else piece.float()
        highest = piece.max()  # NaN if there is one, at a fraction of the cost of isnan
        if math.isnan(highest):
            raise QualityError(
                f"a score is NaN in rows {start} to {start + len(piece) - 1} of {list(scores.shape)}",
                hint="look for NaN in what the method computes, in the weights and in the statistics",
            )
        yield piece, out


def _keep_highest(piece: Array, removed: int, kept: Array) -> None:
    """Fill `kept` [rows, in] so that the `removed` lowest of every row of `piece` [rows, in] leave."""
    inputs = piece.shape[1]
    edge: Array
    if isinstance(piece, np.ndarray):
        # Copied, because a view would keep the whole partitioned piece alive.
        edge = np.partition(piece, removed, axis=1)[:, removed : removed + 1].copy()
    else:
        edge = torch.kthvalue(piece, removed + 1, dim=1, keepdim=True).values
    # The edge is the lowest score that stays; scores equal to it may be too many.
    kept[:] = piece >= edge
    surplus = kept.sum(1) - (inputs - removed)
    tied = surplus > 0
    if not tied.any():
        return
    edge, surplus = edge[tied], surplus[tied][:, None]
    for start in range(0, inputs, CPU_PIECE):  # a whole matrix can be one row, and cumsum counts in 8 bytes
        window = slice(start, start + CPU_PIECE)
        equal = piece[tied, window] == edge
        leaving = equal & (equal.cumsum(1) <= surplus)
        kept[tied, window] = kept[tied, window] & ~leaving
        surplus = surplus - leaving.sum(1)[:, None]
        if not surplus.any():
            return


def _places(device: torch.device, size: int, of: int) -> Array:
    """Return 0, 1 ... of - 1, 0, 1 ... of length `size`, in bytes, in the library of the pieces."""
    place = np.tile(np.arange(of, dtype=np.uint8), size // of)
    return place if device.type == "cpu" else torch.from_numpy(place).to(device)


def _rank(flat: Array, rank: Array, inside: list[Array]) -> Array:
    """Return each score's rank in its group, 0 = leaves first, by comparing the scores with a shifted self.

    Shifting keeps every access contiguous, where a view [groups, M] would have inner loops of M elements.

    Args:
        flat: Scores, whole groups one after the other, shape [n].
        rank: How many members of the group stand behind each score; overwritten.
        inside: For a shift of 1, 2 ... M - 1: is the score that far behind still in the group? Shape [>= n].
    """
    for shift, valid in enumerate(inside, start=1):
        first = flat[:-shift] <= flat[shift:]  # on a tie the lower index leaves first
        first &= valid[: len(first)]
        count = first.view(rank.dtype)
        rank[shift:] += count
        # Bytes wrap around below zero and come back: the end result lies in 0 to M - 1.
        rank[:-shift] -= count
    return rank
