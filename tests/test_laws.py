"""The laws of every pruner, whichever files stand under `pruners`, on every family of models."""

import copy
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import structprune
from structprune.calibration.notebook import Notebook
from structprune.calibration.statistics import gradient_means
from structprune.errors import InputError, Interrupted, UsageError
from structprune.models.arch import all_linears, arch_of, blocks, linears
from structprune.models.cost import count
from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.models.streamed import Batch, open_model
from structprune.plan.key import WRITTEN
from structprune.plan.plan import Plan, PlanWriter
from structprune.pruners import catalogue
from structprune.pruners.weight._family import WeightPruner
from structprune.pruners.weight._scored import ScorePruner
from tests.methods import (
    METHODS,
    STORED_METHODS,
    TOKEN_METHODS,
    WEIGHT_METHODS,
    Home,
    accepts,
    home,
    quick,
    weigher,
)
from tests.tiny import FAMILIES, save_tiny, tiny, tokens

ROOT = Path(__file__).parents[1]
# Families whose linears cannot be stored as products, and what the refusal calls them.
NO_PRODUCTS = {
    "gpt2": "Conv1D",
    "mixtral": "fused expert",
    "qwen2_moe": "fused expert",
    "qwen3_moe": "fused expert",
    "llava": "vision-language model",
    "qwen2_5_vl": "vision-language model",
}


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
    """Count hooks, and methods that an instance has of its own."""
    return sum(
        len(module._forward_hooks)
        + len(module._forward_pre_hooks)
        + sum(callable(getattr(type(module), name, None)) for name in vars(module))
        for module in model.modules()
    )


def warm(home: Home) -> tuple[PreTrainedModel, list[Batch]]:
    """Return a model and batches; transformers installs hooks of its own before the first one."""
    model, data = home.model(), home.batches(4)
    logits(model, data[0])
    return model, data


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


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
        model, data = warm(home(method))
        before, installed = state(model), hooks(model)
        quick(method).calibrate(model, data)
        assert same(before, state(model))
        assert hooks(model) == installed

    def test_1_also_when_it_raises(self, method: str) -> None:
        if not catalogue.find(method).needs_data:
            return  # nothing runs forward, so nothing can raise there
        model, data = warm(home(method))
        before = state(model)
        with broken_third_linear(model):
            installed = hooks(model)
            with pytest.raises(RuntimeError, match="broken"):
                quick(method).calibrate(model, data)
            assert hooks(model) == installed
        assert same(before, state(model))

    def test_2_the_same_seed_gives_the_same_bytes(self, method: str, tmp_path: Path) -> None:
        for name in ("one", "two"):
            quick(method).calibrate(home(method).model(), home(method).batches()).save(tmp_path / name)
        assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")

    def test_3_and_4_a_plan_survives_the_disk_and_applying_it_twice_is_applying_it_once(
        self, method: str, tmp_path: Path
    ) -> None:
        model, (probe, *data) = home(method).model(), home(method).batches(4)
        dense = logits(model, probe)
        pruner = quick(method)
        plan = pruner.calibrate(model, data)
        plan.save(tmp_path)
        loaded = Plan.load(tmp_path)
        assert loaded.id == plan.id
        assert loaded.keys() == plan.keys()
        other = copy.deepcopy(model)
        pruner.apply(model, plan)
        pruner.apply(other, loaded)
        assert same(state(model), state(other))
        once, installed, said = state(model), hooks(model), logits(model, probe)
        assert torch.equal(said, logits(other, probe))
        pruner.apply(model, plan)
        assert same(once, state(model))
        assert hooks(model) == installed
        assert torch.equal(said, logits(model, probe))
        assert not torch.equal(said, dense)

    def test_6_removing_nothing_is_the_identity(self, method: str) -> None:
        model, (probe, *data) = home(method).model(), home(method).batches(4)
        before, dense = state(model), logits(model, probe)
        pruner = quick(method)
        pruner = pruner.with_goal(1.0 if pruner.at_run_time else 0)  # what is kept there, here what goes
        plan = pruner.calibrate(model, data)
        assert not plan.keys()
        assert same(before, state(pruner.apply(model, plan)))
        assert torch.equal(dense, logits(model, probe))

    def test_7_a_plan_for_another_architecture_is_refused_and_changes_nothing(self, method: str) -> None:
        pruner = quick(method)
        plan = pruner.calibrate(home(method).model(), home(method).batches())
        other = tiny("qwen2" if home(method).family != "qwen2" else "llama")
        before, installed = state(other), hooks(other)
        with pytest.raises(InputError, match="architecture"):
            pruner.apply(other, plan)
        assert same(before, state(other))
        assert hooks(other) == installed

    def test_10_the_file_names_its_source_and_has_a_recipe(self, method: str) -> None:
        module = inspect.getmodule(catalogue.find(method))
        assert module is not None
        assert re.search(r"^Source: .*https?://\S+", module.__doc__ or "", re.MULTILINE)
        assert (ROOT / "recipes" / f"{method}.yaml").is_file()
        assert re.search(r"(shape|bool|float32|long),? \[", inspect.getsource(module).lower())

    def test_a_killed_run_resumes_with_the_same_bytes(self, method: str, tmp_path: Path) -> None:
        model, data = home(method).model(), home(method).batches()
        pruner = quick(method)
        whole = pruner.calibrate(model, data)
        writer = PlanWriter(tmp_path, whole.origin)
        writer.write(dict(whole.blocks[0]), whole.blocks[0].facts)
        again = PlanWriter(tmp_path, whole.origin)
        assert again.finished == 1
        assert pruner.calibrate(model, data, again).id == whole.id

    def test_what_is_decided_leaves_memory_for_the_disk(self, method: str, tmp_path: Path) -> None:
        model, data = home(method).model(), home(method).batches()
        pruner = quick(method)
        plan = pruner.calibrate(model, data, pruner.writer(tmp_path, model, "0" * 64))
        assert len(plan.blocks) == len(blocks(model))
        assert all(vars(block)["_packed"] is None for block in plan.blocks)


@pytest.mark.parametrize("method", STORED_METHODS)
class TestLawsOfStoredDecisions:
    def test_4_applying_changes_what_is_stored(self, method: str) -> None:
        model = home(method).model()
        before = state(model)
        pruner = quick(method)
        pruner.apply(model, pruner.calibrate(model, home(method).batches()))
        assert not same(before, state(model))

    def test_9_a_streamed_run_writes_the_plan_of_a_resident_run(self, method: str, tmp_path: Path) -> None:
        folder = home(method).save(tmp_path / "model", shards=2, dtype=torch.bfloat16)
        pruner = quick(method)
        for name, stream in (("resident", False), ("streamed", True)):
            model = open_model(folder, Opening(stream=stream))
            pruner.calibrate(model, home(method).batches()).save(tmp_path / name)
            pruner.apply(model, Plan.load(tmp_path / name))
        assert bytes_of(tmp_path / "resident") == bytes_of(tmp_path / "streamed")

    def test_9_the_applied_models_agree(self, method: str, tmp_path: Path) -> None:
        folder = home(method).save(tmp_path / "model")
        pruner = quick(method)
        probe, *data = home(method).batches(4)
        results = []
        for stream in (False, True):
            model = open_model(folder, Opening(stream=stream))
            results.append(logits(pruner.apply(model, pruner.calibrate(model, data)), probe))
        assert torch.equal(*results)
        assert not torch.equal(results[0], logits(open_model(folder), probe))


@pytest.mark.parametrize("method", TOKEN_METHODS)
class TestLawsOfRunningDecisions:
    def test_4_attaching_changes_no_parameter_and_undoing_leaves_no_hook(self, method: str) -> None:
        model, (probe, *data) = warm(home(method))
        before, installed, dense = state(model), hooks(model), logits(model, probe)
        pruner = quick(method)
        plan = pruner.calibrate(model, data)
        pruner.apply(model, plan)
        assert same(before, state(model))
        assert hooks(model) > installed
        pruner.undo(model, plan)
        assert hooks(model) == installed
        assert torch.equal(dense, logits(model, probe))

    def test_4_a_plan_says_what_runs_one_file_per_block(self, method: str, tmp_path: Path) -> None:
        model, data = home(method).model(), home(method).batches()
        quick(method).calibrate(model, data).save(tmp_path)
        plan = Plan.load(tmp_path)
        paths = [path for path, _ in blocks(model)]
        assert plan.keys() and {str(key) for key in plan} <= {f"{path}:tokens" for path in paths}
        assert len([*tmp_path.glob("block-*.safetensors")]) == len(plan.blocks) == len(paths)
        assert plan.promises is not None and 0 < plan.promises.removed < plan.promises.of

    def test_a_copy_of_an_attached_model_is_pruned_too_and_on_its_own(self, method: str) -> None:
        model, (probe, *data) = home(method).model(), home(method).batches(4)
        dense = logits(model, probe)
        pruner = quick(method)
        plan = pruner.calibrate(model, data)
        said = logits(pruner.apply(model, plan), probe)
        other = copy.deepcopy(model)
        assert torch.equal(said, logits(other, probe))
        pruner.undo(model, plan)
        assert torch.equal(dense, logits(model, probe))
        assert torch.equal(said, logits(other, probe))

    def test_costs_of_an_attached_model_are_counted(self, method: str) -> None:
        model, data = home(method).model(), home(method).batches()
        before = count(model, zeros=0, prunable=0, bytes_on_disk=0)
        pruner = quick(method)
        pruner.apply(model, pruner.calibrate(model, data))
        assert count(model, zeros=0, prunable=0, bytes_on_disk=0) == before

    def test_a_paused_model_is_dense_bit_for_bit(self, method: str) -> None:
        model, (probe, *data) = home(method).model(), home(method).batches(4)
        dense = logits(model, probe)
        with structprune.pruning(model, quick(method), data):
            said = logits(model, probe)
            with structprune.paused(model):
                assert torch.equal(dense, logits(model, probe))
            assert torch.equal(said, logits(model, probe))
            assert not torch.equal(dense, said)
        assert torch.equal(dense, logits(model, probe))

    def test_9_a_streamed_model_is_refused_by_name(self, method: str, tmp_path: Path) -> None:
        folder = home(method).save(tmp_path / "model")
        pruner, data = quick(method), home(method).batches()
        plan = pruner.calibrate(open_model(folder), data)
        streamed = open_model(folder, Opening(stream=True))
        for act in (lambda: pruner.calibrate(streamed, data), lambda: pruner.apply(streamed, plan)):
            with pytest.raises(UsageError, match=f"^{method} .*streamed"):
                act()


# What looks at the whole model before it decides: outlier shares and gradients, each noted block by block.
FIRST_LOOKS = [
    *((name, {"budget": "owl"}) for name in WEIGHT_METHODS if accepts(name, budget="owl", sparsity=0.5)),
    *((name, {}) for name in WEIGHT_METHODS if gradient_means(weigher(name).solving)),
]


@pytest.mark.parametrize(("method", "fields"), FIRST_LOOKS, ids=lambda value: str(value))
@pytest.mark.parametrize("noted", [1, 2])
def test_a_run_killed_while_it_measures_resumes_with_the_same_bytes(
    method: str, fields: dict[str, str], noted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    pruner, data = weigher(method, **fields), batches(tiny("llama"))

    def run(name: str) -> Plan:
        model = open_model(folder, Opening(stream=True))
        return pruner.calibrate(model, data, pruner.writer(tmp_path / name, model, "weights"))

    whole = run("whole")
    write, written = Notebook.write, []

    def stop(self: Notebook, block: int, tensors: dict[str, Tensor]) -> None:
        write(self, block, tensors)
        written.append(block)
        if len(written) == noted:
            raise Interrupted(15)

    monkeypatch.setattr(Notebook, "write", stop)
    with pytest.raises(Interrupted):
        run("out")
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".safetensors"] * noted
    assert run("out").id == whole.id
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    if not gradient_means(pruner.solving):  # what was noted of a block is not measured again
        assert len(written) == 2
    monkeypatch.setattr(Notebook, "write", write)


# What is stored in one dtype and computed in another; rounding to the first must be what later blocks see.
DTYPES = [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")]
ROUNDING: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in WEIGHT_METHODS),
    *(("wanda", {"repair": repair}) for repair in ("obs", "least_squares", "dsnot")),
    ("sparsegpt", {"repair": "least_squares"}),
]


def rounding_cases() -> Iterator[object]:
    """Yield every method with every pair of dtypes; all but the usual pair and one in turn are slow."""
    for number, (method, fields) in enumerate(ROUNDING):
        for turn, (stored, computed) in enumerate(DTYPES):
            marks = () if turn in (0, 1 + number % 2) else pytest.mark.slow
            name = f"{method}-{fields}-{stored}-{computed}"
            yield pytest.param(method, fields, stored, computed, marks=marks, id=name)


@pytest.mark.parametrize(("method", "fields", "stored", "computed"), [*rounding_cases()])
class TestStoredAndComputedDtypes:
    def test_new_values_are_rounded_to_what_their_tensor_is_stored_in(
        self, method: str, fields: dict[str, Any], stored: str, computed: str, tmp_path: Path
    ) -> None:
        folder = save_tiny("llama", tmp_path / "model", shards=2, dtype=getattr(torch, stored))
        pruner, data = weigher(method, **fields), batches(tiny("llama"))
        outputs, plans = [], []
        for stream in (False, True):
            model = open_model(folder, Opening(stream=stream, dtype=computed))
            # A model in memory hashes its weights as it computes with them; a run passes the files' hash.
            plans.append(pruner.calibrate(model, data, pruner.writer(None, model, "0" * 64)))
            outputs.append(logits(pruner.apply(model, plans[-1]), data[0]))
        assert plans[0].id == plans[1].id
        assert torch.equal(*outputs) and outputs[0].dtype == getattr(torch, computed)
        written = [key for key in plans[0] if key.edit in WRITTEN]
        updates = fields.get("repair") in ("obs", "least_squares") or not issubclass(
            catalogue.find(method), ScorePruner
        )
        assert bool(written) == updates
        assert all(plans[0][key].dtype == getattr(torch, stored) for key in written)

    def test_later_blocks_see_the_rounded_values(
        self, method: str, fields: dict[str, Any], stored: str, computed: str, tmp_path: Path
    ) -> None:
        if gradient_means(weigher(method).solving):
            return  # gradients are those of the dense model, whatever the first block has become
        folder = save_tiny("llama", tmp_path / "model", dtype=getattr(torch, stored))
        data = batches(tiny("llama"))
        whole = weigher(method, propagate="pruned", **fields).calibrate(
            open_model(folder, Opening(dtype=computed)), data
        )
        # The first block as its finished decision leaves it, read back from the disk; then the second one.
        first = weigher(method, skip="1", **fields)
        model = open_model(folder, Opening(dtype=computed))
        first.calibrate(model, data).save(tmp_path / "first")
        model = first.apply(model, Plan.load(tmp_path / "first"))
        second = weigher(method, propagate="pruned", skip="0", **fields).calibrate(model, data)
        expected = dict(whole.blocks[1])
        assert expected and expected.keys() == second.keys()
        for key, value in expected.items():
            assert torch.equal(value, second[key]), key


# One family of each way to keep a matrix: as it is, transposed, several experts in one.
LAYOUTS = {"llama", "gpt2", "mixtral"}


def cases() -> Iterator[object]:
    """Yield every method with every family and kind of sparsity; what seldom tells more is slow.

    Every method meets every layout with every sparsity, and a third of the other families in turn, so
    that every family meets three or more of the methods.
    """
    for number, name in enumerate(WEIGHT_METHODS):
        wanted = [sparsity for sparsity in (0.5, "2:4") if accepts(name, sparsity=sparsity)]
        for sparsity in wanted:
            for turn, family in enumerate(FAMILIES):
                quick = family in LAYOUTS or (sparsity == wanted[0] and (number + turn) % 3 == 0)
                marks = () if quick else pytest.mark.slow
                yield pytest.param(name, sparsity, family, marks=marks, id=f"{name}-{sparsity}-{family}")


@pytest.mark.parametrize(("method", "sparsity", "family"), [*cases()])
class TestEveryFamily:
    def test_every_row_of_every_chosen_linear_loses_exactly_what_was_asked(
        self, family: str, method: str, sparsity: float | str, tmp_path: Path
    ) -> None:
        folder = save_tiny(family, tmp_path / "model")
        found = catalogue.find(method)
        by_row = "row" in get_args(found.model_fields["compare"].annotation)
        pruner = weigher(method, sparsity=sparsity, **({"compare": "row"} if by_row else {}))
        if "fold" in found.model_fields and family in NO_PRODUCTS:
            model = open_model(folder)
            with pytest.raises(UsageError, match=rf"^{blocks(model)[0][0]}\..*{NO_PRODUCTS[family]}"):
                pruner.calibrate(model, batches(model))
            pruner = weigher(method, sparsity=sparsity, fold=True)
        by_row = by_row or sparsity == "2:4"
        data = batches(tiny(family))
        plans = [
            pruner.calibrate(open_model(folder, Opening(stream=stream)), data) for stream in (False, True)
        ]
        assert plans[0].id == plans[1].id
        _check_counts(pruner, plans[0], tiny(family))
        dense = state(open_model(folder))
        pruned = pruner.apply(open_model(folder), plans[0])
        changed = 0
        updated = any(key.edit in WRITTEN for key in plans[0])
        for name, value in state(pruned).items():
            kept = value != 0
            assert updated or torch.equal(value[kept], dense[name][kept])
            changed += int(name not in dense or not torch.equal(value, dense[name]))
        assert changed >= 2 * 4 - 2  # both blocks; OPT, Phi-3 and the GPTs have four linears in a block
        for index, (prefix, block) in enumerate(blocks(pruned)):
            for linear in pruner.target_linears(index, linears(prefix, block, arch_of(pruned))):
                zeros = (linear.weight == 0).sum(dim=1)
                if not pruner.leaves_zeros:
                    assert zeros.sum() == 0, linear.label
                    continue
                half = linear.weight.shape[1] // 2
                assert zeros.eq(half).all() if by_row else zeros.sum() == len(zeros) * half, linear.label
                if sparsity == "2:4":
                    assert (linear.weight.reshape(-1, 4) == 0).sum(dim=1).eq(2).all(), linear.label


def _check_counts(pruner: WeightPruner, plan: Plan, model: nn.Module) -> None:
    """Check that as much leaves as was counted before, and that the plan tells of every linear."""
    removed = {label: count for block in plan.blocks for label, count in block.facts["removed"].items()}
    forecast = pruner.forecast(model)
    assert plan.promises is not None
    if pruner.leaves_zeros:
        assert sum(removed.values()) == forecast.reachable == plan.promises.removed
    assert plan.promises.of == forecast.of
    assert removed.keys() == {one.label for block in all_linears(model) for one in block}
