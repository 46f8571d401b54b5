"""Query heads leave while the key-value heads that serve them stay: the same number of every one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from structprune.checkpoint.export import export
from structprune.errors import UsageError
from structprune.models.arch import arch_of, blocks
from structprune.models.edited_reader import EditedReader
from structprune.models.groups import BlockKeep, block_sizes
from structprune.models.identity import names_of
from structprune.models.masking import masked
from structprune.models.native import CONFIG_KEY
from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.models.streamed import open_model
from structprune.plan.plan import Plan
from structprune.progress import silent
from structprune.pruners.catalogue import find
from structprune.pruners.forecast import forecast_all
from tests.test_models_shapes import plain
from tests.tiny import save_tiny, tiny, tokens

METHODS = ["wanda_sp", "magnitude_units", "random_units", "flap", "llm_pruner"]
# Several query heads share a key-value head, in matrices of their own and fused.
GROUPED = ["llama", "qwen3", "phi3", "mixtral"]


def heads(method: str, **fields: Any) -> Any:
    return find(method).model_validate({"units": "head", "sparsity": 0.5, **fields})


def kept_heads(model: Any, plan: Plan) -> dict[int, BlockKeep]:
    """Return which heads stay, as the columns of the output projection tell."""
    arch, found = arch_of(model), {}
    for index, (prefix, block) in enumerate(blocks(model)):
        sizes = block_sizes(block, arch)
        (stored,) = names_of(model).stored_of[f"{prefix}.{arch.o}.weight"]
        (columns,) = [plan[key] for key in plan if key.name == stored and key.edit == "keep"]
        found[index] = BlockKeep(heads=(columns[:: sizes.head_dim] // sizes.head_dim))
    return found


@pytest.mark.parametrize("family", GROUPED)
@pytest.mark.parametrize("method", METHODS)
def test_what_leaves_equals_what_is_masked_and_opens_everywhere(
    method: str, family: str, tmp_path: Path
) -> None:
    folder = save_tiny(family, tmp_path / "dense")
    data = [tokens(tiny(family), length=24, seed=seed) for seed in range(2)]
    pruner = heads(method, repair="none")
    models = [open_model(folder, Opening(stream=stream)) for stream in (False, True)]
    plans = [pruner.calibrate(model, data) for model in models]
    assert plans[0].id == plans[1].id
    dense = open_model(folder, Opening(stream=False))
    before = [block_sizes(block, arch_of(dense)) for _, block in blocks(dense)]
    assert plans[0].promises is not None and plans[0].promises.removed > 0
    if pruner.budget == "uniform":
        (forecast,) = forecast_all([pruner], models[1])
        assert forecast.reachable == plans[0].promises.removed
    with masked(dense, kept_heads(dense, plans[0])):
        expected = logits(dense, data[0])
    applied = pruner.apply(models[0], plans[0])
    found = logits(applied, data[0])
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    after = [block_sizes(block, arch_of(applied)) for _, block in blocks(applied)]
    assert [one.kv_heads for one in after] == [one.kv_heads for one in before]
    assert sum(one.heads for one in after) == sum(one.heads for one in before) // 2
    (out := tmp_path / "out").mkdir()
    export(EditedReader(open_model(folder, Opening(stream=True)).reader, plans[0]), out, silent)
    assert torch.equal(plain(out, trust=CONFIG_KEY in plans[0].patch)(**data[0]).logits, found)


@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_the_head_that_says_nothing_leaves_in_every_group(budget: str) -> None:
    model = tiny("llama")
    arch = arch_of(model)
    for _, block in blocks(model):
        sizes = block_sizes(block, arch)
        each = sizes.heads // sizes.kv_heads
        weight = block.get_parameter(f"{arch.o}.weight")
        with torch.no_grad():
            for group in range(sizes.kv_heads):
                silent_head = group * each + (group % each)
                weight[:, silent_head * sizes.head_dim : (silent_head + 1) * sizes.head_dim] = 0
    pruner = heads("wanda_sp", sparsity=1 / each, budget=budget)
    plan = pruner.calibrate(model, [tokens(model)])
    silent_ones = {group * each + (group % each) for group in range(sizes.kv_heads)}
    for keep in kept_heads(model, plan).values():
        assert keep.heads is not None
        assert silent_ones == set(range(sizes.heads)) - set(keep.heads.tolist())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no block .* has head") as refused:
        heads("wanda_sp").forecast(tiny("gpt2"))
    assert "key-value head" in str(refused.value.hint)
    with pytest.raises(ValidationError, match="choose one of the two"):
        heads("wanda_sp", units="head,kv_group")
