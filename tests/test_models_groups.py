"""A removed unit is a masked one: on every family, for unequal keeps of mixed kinds."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from structprune.decide.units import unit_tensors
from structprune.models.arch import arch_of, blocks
from structprune.models.edit import carry_out
from structprune.models.groups import (
    BlockKeep,
    BlockSizes,
    block_sizes,
    kv_groups,
)
from structprune.models.identity import architecture_of, names_of
from structprune.models.masking import masked
from structprune.plan.origin import Origin
from structprune.plan.plan import PlanWriter
from tests.tiny import FAMILIES, tiny, tokens


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**tokens(model)).logits


def keep_of(sizes: BlockSizes, odd: bool) -> BlockKeep:
    kept = {}
    if sizes.channels:
        kept["channels"] = torch.arange(odd, sizes.channels, 3 if odd else 2)
    if sizes.experts:
        kept["experts"] = torch.tensor([0, 2, 3] if odd else [1, 3])
    if odd:
        groups = kv_groups(sizes, torch.tensor([sizes.kv_heads - 1]))
        return BlockKeep(heads=groups.heads, kv_heads=groups.kv_heads, **kept)
    if sizes.heads > sizes.kv_heads:
        # the second query head of each group
        return BlockKeep(heads=torch.arange(1, sizes.heads, sizes.heads // sizes.kv_heads), **kept)
    return BlockKeep(heads=torch.tensor([0, 2]), kv_heads=torch.tensor([0, 2]), **kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_masking_changes_what_a_model_says_and_restores_every_bit(family: str) -> None:
    model = tiny(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = logits(model)
    arch = arch_of(model)
    sizes = [block_sizes(block, arch) for _, block in blocks(model)]
    for keep in (
        keep_of(sizes[0], odd=True),
        BlockKeep(attention=False),
        BlockKeep(mlp=False),
        BlockKeep(block=False),
    ):
        with masked(model, {0: keep}):
            assert (logits(model) - dense).abs().max() > 1e-3
    assert torch.equal(logits(model), dense)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def cut(model: PreTrainedModel, keeps: dict[int, BlockKeep]) -> PreTrainedModel:
    """Remove for good, from a copy, what `masked` switches off."""
    names, arch = names_of(model), arch_of(model)
    writer = PlanWriter(None, Origin("cut", {}, architecture_of(model), ""))
    for index, (prefix, block) in enumerate(blocks(model, arch)):
        keep = keeps.get(index, BlockKeep())
        writer.write(unit_tensors(prefix, block, arch, keep, names), {})
    copied = copy.deepcopy(model)
    carry_out(copied, writer.finish({}))
    return copied


@pytest.mark.parametrize("family", FAMILIES)
def test_a_removed_unit_is_a_masked_one(family: str) -> None:
    model = tiny(family)
    arch = arch_of(model)
    sizes = [block_sizes(block, arch) for _, block in blocks(model)]
    mixed = [keep_of(one, odd=bool(index)) for index, one in enumerate(sizes)]
    for keeps in (
        {0: mixed[0], 1: mixed[1]},
        {0: BlockKeep(attention=False), 1: BlockKeep(mlp=False)},
        {0: BlockKeep(mlp=False), 1: BlockKeep(attention=False, channels=mixed[1].channels)},
    ):
        with masked(model, keeps):
            expected = logits(model)
        small = cut(model, keeps)
        found = logits(small)
        assert small.num_parameters() < model.num_parameters()
        assert (found - expected).norm() / expected.norm() < 1e-5
