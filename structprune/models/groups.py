"""What leaves a block together: the units of each kind, and where each stands in the tensors of the block.

A KV group is a key-value head with all its query heads, so removing one cuts rows of q, k and v and columns
of o. Query heads may leave too, the same number in every group, because the attention repeats each key-value
head equally often. A channel is a row of gate and up and a column of down. An expert leaves with its router's
row.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from structprune.errors import UsageError
from structprune.models.arch import Arch
from structprune.models.modules import FactoredLinear
from structprune.models.shapes import SkippedMlp

Kind = Literal["kv_group", "head", "channel", "expert", "attention", "mlp", "block"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class BlockSizes:
    """What a block has; 0 where it has none of a kind.

    Attributes:
        heads: Query heads.
        kv_heads: Key-value heads, each of which serves heads / kv_heads query heads.
        head_dim: Size of a head.
        channels: Width of the feed-forward; 0 in a mixture of experts.
        experts: Experts of a mixture; a shared expert is none of them.
        expert_width: Width of each of them.
        attention: Whether there is an attention.
        mlp: Whether there is a feed-forward or a mixture.
    """

    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    channels: int = 0
    experts: int = 0
    expert_width: int = 0
    attention: bool = True
    mlp: bool = True


@dataclass(frozen=True)
class BlockKeep:
    """What stays of a block: ascending indices, None for all.

    Attributes:
        heads: Query heads, shape [n]; the same number of every kept key-value head's.
        kv_heads: Key-value heads, shape [n].
        channels: Channels of the feed-forward, shape [n].
        experts: Experts, shape [n].
        attention: False: the attention's output is zero, and its tensors leave.
        mlp: False: so is the feed-forward's.
        block: False: the block passes on what it reads.
    """

    heads: Tensor | None = None
    kv_heads: Tensor | None = None
    channels: Tensor | None = None
    experts: Tensor | None = None
    attention: bool = True
    mlp: bool = True
    block: bool = True


@dataclass(frozen=True)
class Cut:
    """Indices of one axis of a parameter that stay.

    Attributes:
        path: The parameter's path in its block.
        axis: The axis, in the parameter's own layout.
        indices: Ascending, shape [n].
    """

    path: str
    axis: int
    indices: Tensor


def kv_groups(sizes: BlockSizes, kept: Tensor) -> BlockKeep:
    """Return what stays of an attention that keeps some key-value heads with all their query heads.

    Args:
        sizes: The block's.
        kept: Key-value heads, ascending, shape [n].
    """
    return BlockKeep(heads=spread(kept, sizes.heads // sizes.kv_heads), kv_heads=kept)


def spread(kept: Tensor, size: int) -> Tensor:
    """Return the members of consecutive groups of `size`, in order: of [0, 2] and 2, [0, 1, 4, 5]."""
    return (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()


def fold_heads(scores: Tensor, kv_heads: int) -> Tensor:
    """Return the sum of query heads' scores over each key-value head, shape [kv_heads].

    Args:
        scores: Shape [heads]; head a belongs to the key-value head a // (heads / kv_heads).
        kv_heads: How many key-value heads there are.
    """
    return scores.view(kv_heads, -1).sum(dim=1)


def block_sizes(block: nn.Module, arch: Arch) -> BlockSizes:
    """Return what a block has, read from its modules, which may be on the meta device.

    Raises:
        UsageError: The family is not known, so nobody knows what belongs together in it.
    """
    if arch.fallback:
        raise UsageError(
            f"the parts of a block of model type {arch.model_types[0]!r} are not known",
            hint="structure pruners need a known family; weight pruners work on any",
        )
    found = {path: module for path, module in block.named_modules() if path}
    attention, output = found.get(arch.attention), found.get(arch.o)
    heads = kv_heads = size = 0
    if attention is not None and output is not None:
        size = int(getattr(attention, "head_dim", 0) or getattr(attention, "head_size", 0))
        heads = _inputs(output) // size
        if arch.qkv:
            kv_heads = (_outputs(found[arch.qkv]) // size - heads) // 2
        else:
            kv_heads = _outputs(found[arch.k]) // size
    experts = found.get(arch.experts) if arch.experts else None
    down = found.get(arch.down) if arch.down else None
    wide = None if experts is None else experts.get_parameter(arch.expert_down).shape
    channels = 0 if down is None or isinstance(down, SkippedMlp) else _inputs(down)
    return BlockSizes(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        channels=channels,
        experts=wide[0] if wide else 0,
        expert_width=wide[2] if wide else 0,
        attention=heads > 0,
        mlp=channels > 0 or wide is not None,
    )


def cuts(block: nn.Module, arch: Arch, keep: BlockKeep) -> list[Cut]:
    """Return where a block's parameters are cut so that only some of its heads, channels and experts stay.

    Whole modules that leave are no cuts.

    Args:
        block: The block as it is.
        arch: Its family's row.
        keep: What stays.

    Raises:
        UsageError: Nothing of a kind would stay, or unequal numbers of query heads in the groups.
    """
    sizes = block_sizes(block, arch)
    check_keep(sizes, keep)
    found = [*_attention_cuts(sizes, arch, keep), *_channel_cuts(sizes, arch, keep)]
    found += _expert_cuts(arch, keep)
    here = dict(block.named_parameters())
    # A fused projection stands for two or three; a bias, a gate or a shared layout may not exist.
    return [
        Cut(f"{path}.{leaf}", axis, indices)
        for path, by_output, indices in found
        for leaf, axis in _axes(block, path, by_output=by_output)
        if f"{path}.{leaf}" in here
    ]


def check_keep(sizes: BlockSizes, keep: BlockKeep) -> None:
    """Check that what stays of a block can run.

    Raises:
        UsageError: Nothing of a kind would stay, indices are not ascending or not there, or the kept groups
            have unequal numbers of query heads.
    """
    for name, of in (
        ("heads", sizes.heads),
        ("kv_heads", sizes.kv_heads),
        ("channels", sizes.channels),
        ("experts", sizes.experts),
    ):
        kept: Tensor | None = getattr(keep, name)
        if kept is None:
            continue
        inside = len(kept) > 0 and int(kept[0]) >= 0 and int(kept[-1]) < of
        if not inside or bool((kept.diff() <= 0).any()):
            raise UsageError(
                f"{name}: {kept.tolist()[:8]} of {of} is no ascending list of what stays",
                hint="keep at least one of each, or skip the whole module",
            )
    if keep.heads is not None or keep.kv_heads is not None:
        _check_groups(sizes, keep)


def _check_groups(sizes: BlockSizes, keep: BlockKeep) -> None:
    every = torch.arange(sizes.heads)
    heads = every if keep.heads is None else keep.heads.cpu()
    served = heads // (sizes.heads // sizes.kv_heads)
    groups = torch.arange(sizes.kv_heads) if keep.kv_heads is None else keep.kv_heads.cpu()
    counts = Counter(served.tolist())
    if list(counts) != groups.tolist() or len(set(counts.values())) > 1:
        raise UsageError(
            f"heads: {[*counts.values()]} query heads of the key-value heads {[*counts]} would stay, "
            f"of {groups.tolist()}",
            hint="every key-value head that stays keeps the same number of query heads",
        )


# Of a linear: its path, whether rows (True) or columns (False) of [out, in] are meant, and which stay.
_Rows = tuple[str, bool, Tensor]


def _attention_cuts(sizes: BlockSizes, arch: Arch, keep: BlockKeep) -> Iterator[_Rows]:
    if keep.heads is None and keep.kv_heads is None:
        return
    heads = torch.arange(sizes.heads) if keep.heads is None else keep.heads.cpu()
    groups = torch.arange(sizes.kv_heads) if keep.kv_heads is None else keep.kv_heads.cpu()
    queries, pairs = spread(heads, sizes.head_dim), spread(groups, sizes.head_dim)
    if not arch.qkv:
        yield from ((arch.q, True, queries), (arch.k, True, pairs), (arch.v, True, pairs))
    elif arch.qkv_by_head:
        yield arch.qkv, True, spread(heads, 3 * sizes.head_dim)
    else:
        keys = sizes.heads * sizes.head_dim
        values = keys + sizes.kv_heads * sizes.head_dim
        yield arch.qkv, True, torch.cat([queries, keys + pairs, values + pairs])
    yield arch.o, False, queries


def _channel_cuts(sizes: BlockSizes, arch: Arch, keep: BlockKeep) -> Iterator[_Rows]:
    if keep.channels is None:
        return
    kept = keep.channels.cpu()
    if arch.gate_up:
        yield arch.gate_up, True, torch.cat([kept, sizes.channels + kept])
    else:
        yield from ((path, True, kept) for path in (arch.gate, arch.up) if path)
    yield arch.down, False, kept


def _expert_cuts(arch: Arch, keep: BlockKeep) -> Sequence[_Rows]:
    if keep.experts is None:
        return ()
    # The first router is the one that chooses; others weigh a shared expert.
    return ((arch.experts, True, keep.experts.cpu()), (arch.routers[0], True, keep.experts.cpu()))


def _axes(block: nn.Module, path: str, *, by_output: bool) -> Iterator[tuple[str, int]]:
    """Yield the parameters of a module that are cut with its outputs or inputs, and along which axis."""
    module = block.get_submodule(path)
    if isinstance(module, FactoredLinear):
        raise UsageError(
            f"{path}: a product, which cannot be cut", hint="cut first, or store it as a matrix (--fold)"
        )
    turned = isinstance(module, Conv1D)
    for leaf, parameter in module.named_parameters(recurse=False):
        if by_output:
            yield leaf, 1 if turned and parameter.ndim == 2 else 0
        elif parameter.ndim == 2:
            yield leaf, 0 if turned else 1


def _inputs(linear: nn.Module) -> int:
    return int(linear.nx if isinstance(linear, Conv1D) else linear.in_features)  # type: ignore[arg-type]


def _outputs(linear: nn.Module) -> int:
    return int(linear.nf if isinstance(linear, Conv1D) else linear.out_features)  # type: ignore[arg-type]
