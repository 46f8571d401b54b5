"""How a block of two steps, attention and then feed-forward, does without the first."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structprune.errors import UsageError
from structprune.models.arch import TABLE, Arch, arch_of, blocks
from structprune.models.identity import names_of, skeleton, stored_dtypes
from structprune.models.streamed import Model
from structprune.models.walk import Block
from structprune.plan.key import Key
from structprune.pruners.structure._family import bias_key
from structprune.solvers.bypass import Bypass, FeedForward, RidgeSums


def check_bypass(model: Model) -> None:
    """Check that a model's blocks add attention, then a gated feed-forward, to the states.

    Raises:
        UsageError: They do something else; names the family and those that can.
    """
    module = skeleton(model)
    arch = arch_of(module)
    if arch.mlp_norm:
        return
    known = ", ".join(kind for one in TABLE if one.mlp_norm and not one.experts for kind in one.model_types)
    raise UsageError(
        f"model type {module.config.get_text_config().model_type!r}: not known to add attention, then a "
        "gated feed-forward, which is to make up for it",
        hint=f"take one of {known}, or skip attentions with block_drop and units: [attention]",
    )


def check_feed_forwards(model: Model, indices: Sequence[int]) -> None:
    """Check that the feed-forwards of blocks are there, as plain matrices that can make up for an attention.

    Args:
        model: In memory, streamed, or a twin.
        indices: The blocks.

    Raises:
        UsageError: One has not; names it.
    """
    arch, found = arch_of(skeleton(model)), blocks(model)
    for prefix, block in (found[index] for index in indices):
        there = dict(block.named_parameters())
        for path in (arch.gate, arch.up, arch.down):
            if f"{path}.weight" not in there:
                raise UsageError(
                    f"{prefix}.{path}: gone, or stored as a product, so it cannot make up for the attention",
                    hint="skip this block, or choose adapter: false and refit: false",
                )


def biased_paths(arch: Arch) -> list[str]:
    """Return the linears that an adapter is merged into, by their path in the block."""
    return [arch.gate, arch.up]


@torch.no_grad()
def added_share(model: Model, block: Block) -> Tensor:
    """Return |f(h) - g(h)|^2 / |f(h) - h|^2, of a block f and g, the same without its attention.

    Args:
        model: The dense model.
        block: The current one of a walk; squares are summed over all real tokens.
    """
    arch = arch_of(skeleton(model))
    norm, mlp = block.module.get_submodule(arch.mlp_norm), block.module.get_submodule(arch.mlp)
    # Batch by batch: whoever ran them, they are added in one order.
    sums = torch.zeros(len(block.batches.every), 2, dtype=torch.float64)
    for position, one in enumerate(block.passes()):
        without = one.before + mlp(norm(one.before))
        moved = (one.after.float() - without.float()).square().sum(dtype=torch.float64)
        added = (one.after.float() - one.before.float()).square().sum(dtype=torch.float64)
        sums[block.batches.number(position)] = torch.stack([moved, added]).cpu()
    block.batches.ranks.add_apart(sums)
    share: Tensor = sums[:, 0].sum() / sums[:, 1].sum().clamp_min(1e-30)
    return share


def fit_bytes(model: Model, wanted: Bypass) -> int:
    """Return at most how many bytes the fits of one block take, beside the states.

    Args:
        model: For its sizes.
        wanted: What makes up for attentions.
    """
    arch = arch_of(skeleton(model))
    every = [pair for _, block in blocks(model, arch) for pair in block.named_parameters()]
    shapes = {one.shape for path, one in every if path == f"{arch.gate}.weight"}
    # Gate and up as float32, twice where they are merged; one fit ends before the next begins.
    adapter = max(
        (RidgeSums.nbytes(hidden, hidden) + 16 * width * hidden for width, hidden in shapes), default=0
    )
    refit = max((RidgeSums.nbytes(width, hidden) + 8 * width * hidden for width, hidden in shapes), default=0)
    return max(adapter if wanted.adapter else 0, refit if wanted.refit else 0)


@torch.no_grad()
def fit_bypass(model: Model, block: Block, wanted: Bypass) -> dict[Key, Tensor]:
    """Return new values of a block's feed-forward, for a block that is to lose its attention.

    Args:
        model: The dense model.
        block: The current one of a walk.
        wanted: What makes up for the attention.

    Raises:
        QualityError: A fit met what is not finite.
    """
    arch = arch_of(skeleton(model))
    norm, mlp = block.module.get_submodule(arch.mlp_norm), block.module.get_submodule(arch.mlp)
    half, found = _feed_forward(block.module, arch, mlp), dict[str, Tensor]()
    dtype = half.gate.dtype
    hidden, width = half.gate.shape[1], half.gate.shape[0]
    ranks = block.batches.ranks
    owner = block.index % ranks.count
    if wanted.adapter:
        sums = RidgeSums(hidden, hidden, half.gate.device)
        for one in block.passes((arch.gate,)):
            sums.add(norm(one.before), one.read[arch.gate])
        identity = torch.eye(hidden, device=half.gate.device)
        half = half.merged(*sums.fit_together(ranks, owner, identity, wanted.damping, offset=True))
        half = half.stored(dtype)
        found |= {f"{arch.gate}.weight": half.gate, f"{arch.gate}.bias": half.gate_bias}
        found |= {f"{arch.up}.weight": half.up, f"{arch.up}.bias": half.up_bias}
    if wanted.refit:
        down: Any = block.module.get_submodule(arch.down)
        sums = RidgeSums(width, hidden, half.gate.device)
        for one in block.passes():
            due = one.after.float() - one.before.float() - (0 if down.bias is None else down.bias.float())
            sums.add(half.channels(norm(one.before)), due)
        before = down.weight.float()
        found[f"{arch.down}.weight"], _ = sums.fit_together(
            ranks, owner, before, wanted.damping, offset=False
        )
    return _stored(model, block.prefix, found)


def _stored(model: Model, prefix: str, found: dict[str, Tensor]) -> dict[Key, Tensor]:
    """Return values of a block's parameters by their names in the files, in the dtype of the files."""
    names, dtypes = names_of(model), stored_dtypes(model)
    keys = {}
    for path, value in found.items():
        (weight,) = names.stored_of[f"{prefix}.{path.rpartition('.')[0]}.weight"]
        key = Key(weight, "value") if path.endswith(".weight") else bias_key(weight)
        keys[key] = value.to(dtypes[weight]).contiguous()
    return keys


def _feed_forward(block: nn.Module, arch: Arch, mlp: Any) -> FeedForward:
    gate: Any
    up: Any
    gate, up = block.get_submodule(arch.gate), block.get_submodule(arch.up)
    biases = [
        one.weight.new_zeros(len(one.weight)) if one.bias is None else one.bias.detach() for one in (gate, up)
    ]
    return FeedForward(gate.weight.detach(), biases[0], up.weight.detach(), biases[1], mlp.act_fn)
