"""The laws of every pruner, whichever files stand under `pruners`, on every family of models."""

import copy
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from structprune import pruner as registry
from structprune.errors import InputError
from structprune.models.arch import arch_of, blocks, linears
from structprune.models.streamed import open_model
from structprune.models.walk import logits
from structprune.plan import Plan, PlanWriter
from structprune.pruner import Pruner
from structprune.pruners.weight.family import WeightPruner
from tests.tiny import FAMILIES, save_tiny, tiny, tokens

METHODS = sorted(registry.names())
ROOT = Path(__file__).parents[1]


def batches(model: nn.Module, count: int = 3) -> list[dict[str, Tensor]]:
    return [tokens(model, batch=2, length=24, seed=seed) for seed in range(count)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value.view(torch.uint8), other[name].view(torch.uint8))
        for name, value in one.items()
        if value.ndim
    )


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))
        for module in model.modules()
    )


def removing_nothing(method: type[Pruner]) -> Pruner:
    field = "sparsity" if "sparsity" in method.model_fields else "keep_ratio"
    return method.model_validate({field: 0 if field == "sparsity" else 1.0})


@contextmanager
def broken_third_linear(model: nn.Module) -> Iterator[None]:
    """Make some block's forward raise."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)][3]
    handle = linear.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("method", METHODS)
class TestLaws:
    def test_1_calibrate_leaves_the_model_bit_identical_and_unhooked(self, method: str) -> None:
        model = tiny("llama")
        before = state(model)
        registry.find(method)().calibrate(model, batches(model))
        assert same(before, state(model))
        assert hooks(model) == 0

    def test_1_also_when_it_raises(self, method: str) -> None:
        found = registry.find(method)
        if not found.needs_data:
            return  # nothing runs forward, so nothing can raise there
        model = tiny("llama")
        before = state(model)
        with broken_third_linear(model):
            installed = hooks(model)
            with pytest.raises(RuntimeError, match="broken"):
                found().calibrate(model, batches(model))
            assert hooks(model) == installed
        assert same(before, state(model))

    def test_2_the_same_seed_gives_the_same_bytes(self, method: str, tmp_path: Path) -> None:
        for name in ("one", "two"):
            model = tiny("llama")
            registry.find(method)().calibrate(model, batches(model)).save(tmp_path / name)
        files = sorted(path.name for path in (tmp_path / "one").iterdir())
        assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
        assert all(
            (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files
        )

    def test_3_and_4_a_plan_survives_the_disk_and_applying_it_twice_is_applying_it_once(
        self, method: str, tmp_path: Path
    ) -> None:
        model = tiny("llama")
        pruner = registry.find(method)()
        plan = pruner.calibrate(model, batches(model))
        plan.save(tmp_path)
        loaded = Plan.load(tmp_path)
        assert loaded.id == plan.id
        assert loaded.keys() == plan.keys()
        other = copy.deepcopy(model)
        pruner.apply(model, plan)
        pruner.apply(other, loaded)
        assert same(state(model), state(other))
        once = state(model)
        pruner.apply(model, plan)
        assert same(once, state(model))
        assert not same(once, state(tiny("llama")))

    def test_6_removing_nothing_is_the_identity(self, method: str) -> None:
        model = tiny("llama")
        before = state(model)
        pruner = removing_nothing(registry.find(method))
        plan = pruner.calibrate(model, batches(model))
        assert not plan.keys()
        assert same(before, state(pruner.apply(model, plan)))

    def test_7_a_plan_for_another_architecture_is_refused_and_changes_nothing(self, method: str) -> None:
        pruner = registry.find(method)()
        model = tiny("llama")
        plan = pruner.calibrate(model, batches(model))
        other = tiny("qwen2")
        before = state(other)
        with pytest.raises(InputError, match="architecture"):
            pruner.apply(other, plan)
        assert same(before, state(other))

    def test_9_a_streamed_run_writes_the_plan_of_a_resident_run(self, method: str, tmp_path: Path) -> None:
        folder = save_tiny("llama", tmp_path / "model", shards=2, dtype=torch.bfloat16)
        pruner = registry.find(method)()
        for name, stream in (("resident", False), ("streamed", True)):
            model = open_model(folder, stream=stream)
            data = batches(tiny("llama"))
            pruner.calibrate(model, data).save(tmp_path / name)
            pruner.apply(model, Plan.load(tmp_path / name))
        files = sorted(path.name for path in (tmp_path / "resident").iterdir())
        assert files == sorted(path.name for path in (tmp_path / "streamed").iterdir())
        for file in files:
            assert (tmp_path / "resident" / file).read_bytes() == (tmp_path / "streamed" / file).read_bytes()

    def test_9_the_applied_models_agree(self, method: str, tmp_path: Path) -> None:
        folder = save_tiny("llama", tmp_path / "model")
        pruner = registry.find(method)()
        probe = tokens(tiny("llama"), seed=9)
        results = []
        for stream in (False, True):
            model = open_model(folder, stream=stream)
            plan = pruner.calibrate(model, batches(tiny("llama")))
            results.append(logits(pruner.apply(model, plan), probe))
        assert torch.equal(*results)
        assert not torch.equal(results[0], logits(open_model(folder), probe))

    def test_10_the_file_names_its_source_and_has_a_recipe(self, method: str) -> None:
        module = inspect.getmodule(registry.find(method))
        assert module is not None
        assert re.search(r"^Source: .*https?://\S+", module.__doc__ or "", re.MULTILINE)
        assert (ROOT / "recipes" / f"{method}.yaml").is_file()
        assert "shape [" in inspect.getsource(module).lower()

    def test_a_killed_run_resumes_with_the_same_bytes(self, method: str, tmp_path: Path) -> None:
        model = tiny("llama")
        pruner = registry.find(method)()
        whole = pruner.calibrate(model, batches(model))
        head = (whole.method, whole.config, whole.architecture, whole.weights)
        writer = PlanWriter(tmp_path, *head)
        writer.write(dict(whole.blocks[0]), whole.blocks[0].facts)
        again = PlanWriter(tmp_path, *head)
        assert again.finished == 1
        assert pruner.calibrate(model, batches(model), again).id == whole.id


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method", [name for name in METHODS if issubclass(registry.find(name), WeightPruner)]
)
class TestEveryFamily:
    @pytest.mark.parametrize("sparsity", [0.5, "2:4"])
    def test_every_row_of_every_chosen_linear_loses_exactly_what_was_asked(
        self, family: str, method: str, sparsity: float | str, tmp_path: Path
    ) -> None:
        folder = save_tiny(family, tmp_path / "model")
        found = registry.find(method)
        by_row = "row" in get_args(found.model_fields["compare"].annotation)
        pruner = found.model_validate({"sparsity": sparsity} | ({"compare": "row"} if by_row else {}))
        by_row = by_row or sparsity == "2:4"
        data = batches(tiny(family))
        plans = []
        for stream in (False, True):
            model = open_model(folder, stream=stream)
            plans.append(pruner.calibrate(model, data))
        assert plans[0].id == plans[1].id
        dense = state(open_model(folder))
        model = open_model(folder)
        pruned = pruner.apply(model, plans[0])
        changed = 0
        for name, value in state(pruned).items():
            kept = value != 0
            updated = any(key.endswith(":value") for key in plans[0])
            assert updated or torch.equal(value[kept], dense[name][kept])
            changed += int(not torch.equal(value, dense[name]))
        assert changed >= 2 * 4 - 2  # both blocks; OPT, Phi-3 and the GPTs have four linears in a block
        for index, (prefix, block) in enumerate(blocks(pruned)):
            for linear in pruner.chosen(index, linears(prefix, block, arch_of(pruned))):
                zeros = (linear.weight == 0).sum(dim=1)
                half = linear.weight.shape[1] // 2
                assert zeros.eq(half).all() if by_row else zeros.sum() == len(zeros) * half, linear.label
                if sparsity == "2:4":
                    assert (linear.weight.reshape(-1, 4) == 0).sum(dim=1).eq(2).all(), linear.label
