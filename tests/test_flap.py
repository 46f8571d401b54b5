"""FLAP: exact variances, standardised scores, and a bias for the mean of what left."""

import copy

import pytest
import torch
from torch import Tensor, nn

from structprune.calibration.collect import collect_inputs
from structprune.decide.units import unit_blocks
from structprune.models.arch import arch_of, blocks
from structprune.models.outputs import logits
from structprune.models.walk import Walk
from structprune.pruners.blockwise import Seen
from structprune.pruners.catalogue import find
from structprune.pruners.structure._width_block import width_block
from tests.tiny import tiny, tokens

Batches = list[dict[str, Tensor]]


def padded(model: nn.Module) -> Batches:
    """Two batches, one of them with padding on the left."""
    found = [tokens(model, batch=2, length=24, seed=seed) for seed in range(2)]
    found[0]["attention_mask"] = torch.ones(2, 24, dtype=torch.int64)
    found[0]["attention_mask"][1, :9] = 0
    return found


def reads(model: nn.Module, path: str, batches: Batches) -> Tensor:
    """Return what a linear of the dense model reads of real tokens, shape [tokens, in], float64."""
    rows: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool() for batch in batches]
    return torch.cat(
        [row.view(*mask.shape, -1)[mask] for row, mask in zip(rows, masks, strict=True)]
    ).double()


def test_scores_are_exact_variances_over_all_real_tokens_standardised_within_a_matrix() -> None:
    model = tiny("llama")
    pruner, data = find("flap")(), padded(model)
    for block in Walk(model, data):
        readers = pruner.readers(block)
        sums = collect_inputs(block, list(readers.values()), frozenset({"moments"}), advance=True)
        known = width_block(unit_blocks(model)[block.index], ("kv_group", "channel"))
        found = pruner.score_units(known, readers, Seen(sums))
        for kind, linear in readers.items():
            variance = reads(model, linear.label, data).var(dim=0, correction=0)
            columns = variance * linear.weight.double().square().sum(dim=0)
            expected = (columns - columns.mean()) / columns.std()
            if kind == "kv_group":  # the mean over both query heads of each group
                expected = torch.stack([expected[:32].mean(), expected[32:].mean()])
            else:
                assert abs(float(found[kind].mean())) < 1e-5
                assert float(found[kind].std()) == pytest.approx(1, abs=1e-5)
            assert torch.allclose(found[kind].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_the_bias_gains_the_mean_of_what_left(family: str) -> None:
    model, data = tiny(family), padded(tiny(family))
    pruner = find("flap")(sparsity=0.5, units=("channel",))
    arch = arch_of(model)
    prefix, block = blocks(model)[0]
    down = block.get_submodule(arch.down)
    turned = family == "gpt2"
    weight = (down.weight.T if turned else down.weight).detach().double()
    before = torch.zeros(64).double() if down.bias is None else down.bias.detach().double()
    inputs = reads(model, f"{prefix}.{arch.down}", data)
    plan = pruner.calibrate(model, data)
    kept = next(plan[key] for key in plan if key.edit.startswith("keep") and arch.down in key.name)
    removed = [index for index in range(96) if index not in kept.tolist()]
    assert 0 < len(removed) < 96
    pruner.apply(model, plan)
    gained = inputs[:, removed].mean(dim=0) @ weight[:, removed].T
    found = blocks(model)[0][1].get_submodule(arch.down).bias.double()
    assert torch.allclose(found, before + gained, rtol=1e-4, atol=1e-6)


def test_what_never_changes_is_replaced_by_its_bias_exactly() -> None:
    model = tiny("opt")  # relu(constant bias) is what its channels are, once up has no weights
    with torch.no_grad():
        for _, block in blocks(model):
            block.fc1.weight.zero_()
            block.fc1.bias.uniform_(0.5, 1.0)
    data = [tokens(model, seed=seed) for seed in range(2)]
    dense = logits(copy.deepcopy(model), data[0])
    pruner = find("flap")(sparsity=0.7, units=("channel",))
    pruner.apply(model, pruner.calibrate(model, data))
    assert model.num_parameters() < tiny("opt").num_parameters()
    assert torch.allclose(logits(model, data[0]), dense, atol=1e-5)


def test_what_fluctuates_most_stays() -> None:
    pruner = find("flap")(sparsity=0.25, units=("channel",))
    model = tiny("llama")
    with torch.no_grad():
        for _, block in blocks(model):
            block.mlp.up_proj.weight[::2] *= 10
    plan = pruner.calibrate(model, [tokens(model)])
    for key in plan:
        if "down_proj" in key.name and key.kind == "keep.1":
            assert set(range(0, 96, 2)) <= set(plan[key].tolist())
