"""A model with units switched off, for a while and without cutting anything: what removing them would leave.

Masked are the columns of the output and the down projection that read a head or a channel, the routing to an
expert, or the output of a whole module; a masked block passes on what it reads. It is what a removal is held
against, and what a search scores.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from structprune.models.arch import Arch, arch_of, blocks
from structprune.models.groups import BlockKeep, Cut, block_sizes, check_keep, cuts
from structprune.models.shapes import SkippedAttention, SkippedMlp
from structprune.models.walk import replaced_forward


@contextmanager
def masked(model: PreTrainedModel, keeps: Mapping[int, BlockKeep]) -> Iterator[None]:
    """Switch units of a model in memory off for the length of a `with`; every bit is restored.

    Args:
        model: In memory.
        keeps: By index of the block, what stays on.

    Raises:
        UsageError: What stays cannot run.
    """
    arch = arch_of(model)
    found = blocks(model, arch)
    with ExitStack() as stack:
        for index, keep in keeps.items():
            stack.enter_context(masked_block(found[index][1], arch, keep))
        yield


@contextmanager
def masked_block(block: nn.Module, arch: Arch, keep: BlockKeep) -> Iterator[None]:
    """Switch units of one block off for the length of a `with`; all else is as for `masked`."""
    check_keep(block_sizes(block, arch), keep)
    with ExitStack() as stack:
        for forward, path in _stand_ins(block, arch, keep):
            stack.enter_context(replaced_forward(block.get_submodule(path), forward))
        for cut in cuts(block, arch, keep):
            if cut.path in (f"{arch.o}.weight", f"{arch.down}.weight"):
                stack.enter_context(_without(block.get_parameter(cut.path), cut))
        if not keep.mlp and not arch.mlp:  # the linears of the feed-forward sit directly in the block
            for parameter in block.get_submodule(arch.down).parameters():
                nothing = Cut(arch.down, 0, torch.empty(0, dtype=torch.int64))
                stack.enter_context(_without(parameter, nothing))
        yield


def _stand_ins(block: nn.Module, arch: Arch, keep: BlockKeep) -> Iterator[tuple[Callable[..., Any], str]]:
    """Yield forwards of modules that are masked as a whole, and where they belong."""
    modules = dict(block.named_modules())
    attention = modules.get(arch.attention)
    skipped = SkippedAttention(int(getattr(attention, "layer_idx", 0)))
    if not keep.block:
        yield _passing(skipped), ""
        return
    if not keep.attention and attention is not None:
        yield skipped.forward, arch.attention
    if not keep.mlp and arch.mlp:
        yield SkippedMlp().forward, arch.mlp
    if keep.experts is not None:
        yield _routed(modules[arch.routers[0]], keep.experts), arch.routers[0]


def _passing(skipped: SkippedAttention) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        skipped.forward(hidden_states, *args, **kwargs)  # for the cache
        return hidden_states

    return forward


def _routed(router: nn.Module, kept: Tensor) -> Callable[..., Any]:
    """Return a router's forward to which experts that are switched off have logits of minus infinity."""
    weight, inner = router.get_parameter("weight"), router.forward
    here = kept.to(weight.device)

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        whole = weight.data
        # What is chosen among fewer rows is what would be chosen if the others could not be.
        weight.data = whole[here]
        try:
            logits, scores, chosen = inner(hidden)
        finally:
            weight.data = whole
        full = logits.new_full((*logits.shape[:-1], len(whole)), -torch.inf)
        return full.index_copy(-1, here, logits), scores, here[chosen]

    return forward


@contextmanager
def _without(parameter: nn.Parameter, cut: Cut) -> Iterator[None]:
    """Hold zero in what a cut takes away."""
    gone = torch.ones(parameter.shape[cut.axis], dtype=torch.bool)
    gone[cut.indices] = False
    places = gone.nonzero().flatten().to(parameter.device)
    before = parameter.data.index_select(cut.axis, places)
    parameter.data.index_fill_(cut.axis, places, 0)
    try:
        yield
    finally:
        parameter.data.index_copy_(cut.axis, places, before)
