"""Which units stay of a block, and what that is in the tensors of a plan."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from structprune.decide.unit_counts import UnitCounts, WidthUnit
from structprune.models.arch import Arch, arch_of, blocks
from structprune.models.groups import BlockKeep, BlockSizes, block_sizes, cuts, kv_groups
from structprune.models.identity import skeleton
from structprune.models.names import Names
from structprune.models.streamed import Model
from structprune.plan.key import Key


@dataclass(frozen=True)
class UnitBlock:
    """A block of which units may leave.

    Attributes:
        prefix: Its path in the model.
        module: The block; its parameters may be on the meta device.
        arch: Its family's row.
        sizes: What it has.
    """

    prefix: str
    module: nn.Module
    arch: Arch
    sizes: BlockSizes


def unit_blocks(model: Model) -> list[UnitBlock]:
    """Return the blocks of a model, first to last.

    Args:
        model: In memory, streamed, or a twin.

    Raises:
        UsageError: The family's parts are not known.
    """
    module = skeleton(model)
    arch = arch_of(module)
    return [UnitBlock(*one, arch, block_sizes(one[1], arch)) for one in blocks(module, arch)]


def highest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the highest scores, ascending; of equal ones the first stays, shape [count]."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def chosen_units(sizes: BlockSizes, stay: UnitCounts, scores: Mapping[WidthUnit, Tensor]) -> BlockKeep:
    """Return what stays of a block: its units of the highest scores.

    Args:
        sizes: The block's.
        stay: How many.
        scores: By kind, "kv_group" [kv_heads], "head" [heads] and "channel" [channels]; not needed where all
            stay.
    """
    keep = BlockKeep()
    if stay.kv_groups < sizes.kv_heads:
        keep = kv_groups(sizes, highest(scores["kv_group"], stay.kv_groups))
    elif stay.heads * sizes.kv_heads < sizes.heads:
        each = scores["head"].view(sizes.kv_heads, -1)
        first = range(0, sizes.heads, each.shape[1])
        found = [at + highest(one, stay.heads) for at, one in zip(first, each, strict=True)]
        keep = BlockKeep(heads=torch.cat(found))
    if stay.channels < sizes.channels:
        keep = replace(keep, channels=highest(scores["channel"], stay.channels))
    return keep


def first_units(sizes: BlockSizes, stay: UnitCounts) -> BlockKeep:
    """Return a keep of the right sizes before anybody knows which units stay."""
    units: dict[WidthUnit, int] = {
        "kv_group": sizes.kv_heads,
        "head": sizes.heads,
        "channel": sizes.channels,
    }
    return chosen_units(sizes, stay, {kind: torch.zeros(count) for kind, count in units.items()})


def sizes_left(sizes: BlockSizes, keep: BlockKeep) -> BlockSizes:
    """Return what a block has once only some of it stays."""

    def count(kept: Tensor | None, there: int) -> int:
        return there if kept is None else len(kept)

    return replace(
        sizes,
        heads=count(keep.heads, sizes.heads),
        kv_heads=count(keep.kv_heads, sizes.kv_heads),
        channels=count(keep.channels, sizes.channels),
        experts=count(keep.experts, sizes.experts),
    )


def unit_tensors(one: UnitBlock, keep: BlockKeep, names: Names) -> dict[Key, Tensor]:
    """Return the tensors of a plan that leaves of one block what is to be kept.

    Args:
        one: The block as it is.
        keep: What stays; the block itself does.
        names: The model's.
    """
    prefix, block, arch = one.prefix, one.module, one.arch
    gone = [] if keep.attention else [arch.attention]
    gone += [] if keep.mlp else [arch.mlp] if arch.mlp else [arch.up, arch.down]
    found: dict[Key, Tensor] = {}
    for path in gone:
        for name, _ in block.get_submodule(path).named_parameters():
            for stored in names.stored_of[f"{prefix}.{path}.{name}"]:
                found[Key(stored, "drop")] = torch.empty(0)
    for cut in cuts(block, arch, keep):
        stored, *more = names.stored_of[f"{prefix}.{cut.path}"]
        if more:  # each expert is stored apart: all tensors of a numbered list are cut at once
            found[Key(stored[: _last_number(stored)], "members")] = cut.indices
        elif Key(stored, "drop") not in found:
            found[Key(stored, f"keep.{cut.axis}")] = cut.indices
    return found


def block_members(kept: Tensor, found: Sequence[tuple[str, nn.Module]], names: Names) -> dict[Key, Tensor]:
    """Return the tensor of a plan that leaves some of the blocks only.

    Args:
        kept: Indices of the blocks that stay, ascending, shape [n].
        found: Every block with its path.
        names: The model's.
    """
    return {Key(block_list(found, names), "members"): kept}


def block_list(found: Sequence[tuple[str, nn.Module]], names: Names) -> str:
    """Return what stands before the blocks' numbers in the names of stored tensors.

    Args:
        found: Every block with its path.
        names: The model's.
    """
    prefix, block = found[0]
    inside = next(name for name, _ in block.named_parameters())
    (stored,) = names.stored_of[f"{prefix}.{inside}"]
    return stored.removesuffix(f".0.{inside}")


def _last_number(name: str) -> int:
    """Return where the last number between dots begins, with the dot before it."""
    return [match.start() for match in re.finditer(r"\.\d+(?=\.)", name)][-1]
