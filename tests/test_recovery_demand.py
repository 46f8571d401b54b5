"""What training is said to take before it runs, beside what it takes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import structprune
from structprune.errors import EnvironmentFailure, InputError, UsageError
from structprune.evaluation import footprint
from structprune.models.arch import blocks
from structprune.models.outputs import BodyAndHead
from structprune.models.twin import twin_of
from structprune.recipe.draft import RecoverRun
from structprune.recipe.recipe import Recipe
from structprune.recovery import demand
from structprune.recovery.checkpointing import checkpointed
from structprune.recovery.demand import step_sharing, training_bytes, training_demand
from structprune.recovery.masked_lora import MaskedLayers
from structprune.recovery.masks import nonzero_masks, trained_names
from tests.recovering import LENGTH, options, recover
from tests.tiny import save_tiny, tiny, tokens

TEXT = Path(structprune.__file__).parent / "demo" / "calibration.txt"


def saved_numbers(family: str, *, checkpointing: bool = False) -> int:
    """Return how many numbers autograd keeps of what passes through the blocks of a model that trains."""
    model, kept = copy.deepcopy(tiny(family)), {}
    MaskedLayers(model, trained_names(model), rank=1, alpha=2, ranks={})

    def keep(value: Tensor) -> Tensor:
        if not isinstance(value, nn.Parameter) and value.is_floating_point():
            kept[value.untyped_storage().data_ptr()] = value
        return value

    batch = tokens(model, batch=4, length=LENGTH)
    with (
        checkpointed(model, asked=checkpointing),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
    ):
        output = BodyAndHead(model).run(batch)
    assert output.states.requires_grad
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(value.untyped_storage().nbytes() // 4 for at, value in kept.items() if at not in own)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_what_waits_for_the_backward_pass_is_what_linears_read_and_write(family: str) -> None:
    model, asked = tiny(family), options(batch_size=4, length=LENGTH, rank=1)
    said = demand._states(demand._linears(model), step_sharing(asked, model))
    # Of a mixture the choice of experts, and what each of them gives, is kept beside.
    assert 0.8 * said < saved_numbers(family) < 1.8 * said


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_checkpointing_keeps_what_enters_each_block(family: str) -> None:
    model = tiny(family)
    entering = len(blocks(model)) * 4 * LENGTH * model.config.get_text_config().hidden_size
    # And what the norm behind the blocks reads, positions and the like.
    assert entering <= saved_numbers(family, checkpointing=True) < 2 * entering + 4 * LENGTH * LENGTH
    assert 2 * saved_numbers(family, checkpointing=True) < saved_numbers(family)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_changes_no_bit(family: str, dtype: str) -> None:
    found = []
    for asked in (False, True):
        model = copy.deepcopy(tiny(family))
        changes = {"steps": 4, "check_every": 2, "gradient_checkpointing": asked, "dtype": dtype}
        recover(model, nonzero_masks(model), teacher=copy.deepcopy(model), **changes)
        assert all("forward" not in block.__dict__ for _, block in blocks(model))
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert any(not torch.equal(value, tiny(family).state_dict()[name]) for name, value in found[0].items())


@pytest.mark.parametrize(("taught", "checkpointing"), [(False, False), (True, False), (False, True)])
def test_operations_are_those_that_run(taught: bool, checkpointing: bool) -> None:
    model = copy.deepcopy(tiny("llama"))
    teacher = tiny("llama") if taught else None
    changes = {"steps": 5, "check_every": 2, "rank": 1, "gradient_checkpointing": checkpointing}
    asked = options(samples=96, length=LENGTH, **changes)
    said = training_demand(asked, twin_of(model), teacher, step_sharing(asked, model))
    with FlopCounterMode(display=False) as counter:
        recover(model, nonzero_masks(model), teacher=teacher, **changes)
    assert said.forward == pytest.approx(counter.get_total_flops(), rel=0.2)


def test_memory_grows_with_what_there_is_more_of() -> None:
    model = tiny("llama", depth=8)

    def needed(teacher: bool = False, **changes: object) -> int:
        asked = options(length=LENGTH, **changes)
        return training_bytes(asked, model, model if teacher else None, step_sharing(asked, model))

    weights = sum(p.numel() for p in model.parameters())
    assert needed() > 4 * weights
    assert needed(teacher=True) == needed() + 4 * weights
    assert needed(batch_size=16) > needed(batch_size=8) > needed(batch_size=8, rank=4)
    assert needed(gradient_checkpointing=True) < needed()
    assert needed(ranks={"q_proj": 32}) == needed(rank=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model")
    return tmp_path / "model"


def dry_run(folder: Path, **changes: Any) -> dict[str, Any]:
    raw = {
        "model": str(folder),
        "output": str(folder.parent / "out"),
        "prune": {"method": "magnitude"},
        "recover": {"data": str(TEXT), "length": LENGTH, **changes},
    }
    return structprune.dry_run(Recipe.model_validate(raw))


@pytest.fixture(autouse=True)
def no_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the figures of the user out of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_dry_run_tells_what_training_takes(folder: Path, tmp_path: Path) -> None:
    found = dry_run(folder, steps=7)
    said = found["recover"]
    assert (said["pruned"], said["steps"], said["seconds"]) == (str(tmp_path / "out.pruned"), 7, None)
    assert min(said["memory_bytes"], said["free_bytes"], said["state_bytes"]) > 0
    assert dry_run(folder, batch_size=16)["recover"]["memory_bytes"] > found["recover"]["memory_bytes"]
    # Two folders are written, but of an adapter only the one that it belongs to.
    alone = dry_run(folder, keep_adapter=True)["disk_bytes"]
    assert found["disk_bytes"] >= alone + found["bytes"]["pruned"]


def test_a_dry_run_refuses_what_the_training_would(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the teacher has \d+ tokens in its vocabulary"):
        dry_run(folder, teacher="demo")
    with pytest.raises(UsageError, match=r"recover\.shard"):
        dry_run(folder, shard=True)


class TestRecoverAlone:
    """`structprune recover --dry-run`, of a folder that is pruned already."""

    def dry_run(self, folder: Path, **changes: Any) -> dict[str, Any]:
        raw = {"model": str(folder), "output": str(folder.parent / "better"), "device": "cpu"}
        raw["recover"] = {"data": str(TEXT), "length": LENGTH, **changes}
        return structprune.dry_run(RecoverRun.model_validate(raw))

    def test_it_says_what_the_recipe_of_both_says(self, folder: Path, tmp_path: Path) -> None:
        structprune.prune(str(folder), tmp_path / "pruned", "magnitude", sparsity=0.5, evaluate=False)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        found = self.dry_run(tmp_path / "pruned", steps=7)
        both = dry_run(folder, steps=7)["recover"]
        assert {**found["recover"], "free_bytes": 0, "pruned": both["pruned"]} == both | {"free_bytes": 0}
        assert found["plans"] == ["magnitude"]
        adapter = self.dry_run(tmp_path / "pruned", keep_adapter=True)
        weights = (tmp_path / "pruned" / "model.safetensors").stat().st_size
        assert found["disk_bytes"] == adapter["disk_bytes"] + weights
        assert adapter["disk_bytes"] > adapter["recover"]["state_bytes"]
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    def test_it_refuses_what_the_training_would(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"the teacher has \d+ tokens in its vocabulary"):
            self.dry_run(folder, teacher="demo")
        with pytest.raises(UsageError, match="importance of the blocks"):
            self.dry_run(folder, ranks="importance")
        with pytest.raises(InputError, match="nowhere"):
            self.dry_run(folder, data=str(tmp_path / "nowhere.txt"))
        (tmp_path / "better").mkdir()
        (tmp_path / "better" / "mine").write_text("kept")
        with pytest.raises(EnvironmentFailure, match="better: exists"):
            self.dry_run(folder)

    def test_less_memory_than_it_needs_is_told_before_it_trains(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, command: Any
    ) -> None:
        words = (
            "recover",
            folder,
            folder.parent / "better",
            "--data",
            TEXT,
            "--length",
            LENGTH,
            "--no-evaluate",
        )
        few = ("--steps", 1, "--batch-size", 1, "--samples", 2)
        assert "training is expected to need" not in command(*words, *few).err
        monkeypatch.setattr(footprint, "available_memory", lambda: 1000)
        told = command(*words, *few, "--restart", "--overwrite").err
        assert "training is expected to need" in told and "1 kB are free" in told

    def test_people_read_it(self, folder: Path, command: Any) -> None:
        words = ("recover", folder, folder.parent / "better", "--data", TEXT, "--length", LENGTH, "--dry-run")
        done = command(*words)
        assert done.code == 0
        assert "  memory to train: " in done.out and "`structprune bench --rates`" in done.out
        assert "time to decide" not in done.out
        assert command(*words, "--json").json["recover"]["steps"] == 200
