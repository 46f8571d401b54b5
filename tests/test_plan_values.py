"""New values and factors lie once in a finished folder: in its weights; the plan refers to them."""

import json
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import structprune
from structprune.checkpoint.plans import plans_of, read_plans
from structprune.checkpoint.writing import Writing
from structprune.errors import InputError, Interrupted
from structprune.models.opening import Opening
from structprune.plan.key import WRITTEN, Key
from structprune.plan.plan import Plan
from structprune.proof.verify import verify
from structprune.recipe.recipe import EvaluateOptions, RecoverOptions
from tests.methods import EVALUATION, QUICK, quick, short_runs
from tests.tiny import save_tiny

PLAN = Path("structprune/plans")
TEXT = "".join(f"{number} follows {number - 1}, and {number + 1} comes next. " for number in range(1, 400))
METHODS = ("sparsegpt", "armor")
finish = import_module("structprune.pipeline.finish")  # the package has a function of that name too


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    with short_runs():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("source") / "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a finished folder of a method that writes values, and of one that writes factors."""
    root = tmp_path_factory.mktemp("pruned")
    for method in METHODS:
        structprune.prune(model, root / method, quick(method), **QUICK)
    return {method: root / method for method in METHODS}


@pytest.fixture(scope="module")
def recovered(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("recovered")
    (root / "text.txt").write_text(TEXT)
    training = {"steps": 8, "check_every": 4, "length": 32, "learning_rate": 1e-2, "rank": 4}
    options = RecoverOptions(data=str(root / "text.txt"), **training)
    report = structprune.recover(
        str(folders["sparsegpt"]),
        root / "out",
        options,
        opening=Opening(device="cpu"),
        evaluate=EvaluateOptions.model_validate(EVALUATION),
        writing=Writing(reload=False),
    )
    return root / "out", report


def plan_in(folder: Path) -> Path:
    (found,) = (folder / PLAN).iterdir()
    return found


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def edit(folder: Path, name: str, change: Any) -> None:
    """Change one tensor of a copy's only weight file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("method", METHODS)
class TestAFinishedFolder:
    def test_holds_no_value_twice(self, method: str, folders: dict[str, Path]) -> None:
        folder = folders[method]
        blocks = sorted(plan_in(folder).glob("block-*.safetensors"))
        masks = sum(-(-tensor.numel() // 8) for tensor in _masked(folder).values())
        held = sum(tensor.nbytes for block in blocks for tensor in load_file(block).values())
        assert held == masks  # bits of the masks and nothing else
        assert len(blocks) == 2
        (plan,) = plans_of(folder)
        referred = {key for block in plan.blocks for key in block.referred}
        assert referred == {key for key in plan if key.edit in WRITTEN}
        assert referred

    def test_its_plan_keeps_its_id_and_its_values(
        self, method: str, folders: dict[str, Path], model: Path
    ) -> None:
        (plan,) = read_plans(folders[method])
        head = json.loads((plan_in(folders[method]) / "plan.json").read_text())
        assert plan.id == head["id"]
        saved = load_file(folders[method] / "model.safetensors")
        for key in plan:
            if key.edit in WRITTEN:
                assert torch.equal(plan[key], saved[key.name])
        whole = Plan(plan.origin, plan.blocks, promises=plan.promises, patch=plan.patch)
        assert whole.id == plan.id

    def test_its_plan_gives_the_same_bytes_again(
        self, method: str, folders: dict[str, Path], model: Path, tmp_path: Path
    ) -> None:
        report = structprune.apply(
            str(model), tmp_path / "out", folders[method], writing=Writing(reload=False)
        )
        assert report["verification"]["ok"]
        assert weights(tmp_path / "out") == weights(folders[method])
        assert plans_of(tmp_path / "out")[0].id == plans_of(folders[method])[0].id
        # and what was written refers to its own weights
        structprune.apply(str(model), tmp_path / "again", tmp_path / "out", writing=Writing(reload=False))
        assert weights(tmp_path / "again") == weights(folders[method])

    def test_a_plan_taken_out_of_it_is_refused_with_the_way_to_go(
        self, method: str, folders: dict[str, Path], model: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(plan_in(folders[method]), tmp_path / "plan")
        with pytest.raises(InputError, match="kept in the weights of the pruned model only") as raised:
            structprune.apply(str(model), tmp_path / "out", tmp_path / "plan", writing=Writing(reload=False))
        assert "give the whole folder" in raised.value.hint
        assert not (tmp_path / "out").exists()

    def test_a_run_stopped_between_referring_and_publishing_resumes(
        self,
        method: str,
        folders: dict[str, Path],
        model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        refer = finish.refer_plans

        def stop(plans: Path, folder: Path) -> None:
            refer(plans, folder)
            raise Interrupted(15)

        with monkeypatch.context() as patch:
            patch.setattr(finish, "refer_plans", stop)
            with pytest.raises(Interrupted):
                structprune.prune(model, tmp_path / "out", quick(method), **QUICK)
        assert not (tmp_path / "out").exists()
        structprune.prune(model, tmp_path / "out", quick(method), **QUICK)
        assert weights(tmp_path / "out") == weights(folders[method])
        assert plans_of(tmp_path / "out")[0].id == plans_of(folders[method])[0].id
        assert verify(tmp_path / "out", model, reload=False).ok
        assert not list(tmp_path.glob("*.partial-*"))


class TestVerify:
    def test_a_changed_value_is_found(self, folders: dict[str, Path], model: Path, tmp_path: Path) -> None:
        out = shutil.copytree(folders["sparsegpt"], tmp_path / "out")
        name = "model.layers.1.mlp.up_proj.weight"
        edit(out, name, lambda value: torch.where(value == 0, value, value * 1.5))
        found = verify(out, model, reload=False, written={})
        assert [check.name for check in found.failed] == ["values"]
        assert found.failed[0].detail == f"{name}: its values are not those that the plan decided on"
        with pytest.raises(InputError, match=f"{name}: the weights were changed after the plan was made"):
            structprune.apply(str(model), tmp_path / "again", out, writing=Writing(reload=False))

    def test_a_removed_weight_that_came_back_is_found(
        self, folders: dict[str, Path], model: Path, tmp_path: Path
    ) -> None:
        out = shutil.copytree(folders["sparsegpt"], tmp_path / "out")
        edit(out, "model.layers.0.mlp.up_proj.weight", lambda value: value.masked_fill(value == 0, 0.25))
        failed = {check.name for check in verify(out, model, reload=False).failed}
        assert failed >= {"manifest", "masks", "values"}


class TestAfterTraining:
    def test_the_plans_values_are_not_put_back(
        self, recovered: tuple[Path, dict[str, Any]], folders: dict[str, Path]
    ) -> None:
        out, report = recovered
        assert report["sparsity"] == 0.5 and report["recovery"]["masks"] == "plans"
        before, after = (load_file(folder / "model.safetensors") for folder in (folders["sparsegpt"], out))
        trained = [name for name in before if not torch.equal(before[name], after[name])]
        assert len(trained) == 14
        assert all(torch.equal(before[name] == 0, after[name] == 0) for name in trained)

    def test_the_folder_passes_verify_and_opens(
        self, recovered: tuple[Path, dict[str, Any]], folders: dict[str, Path]
    ) -> None:
        out, _ = recovered
        assert verify(out, folders["sparsegpt"], reload=False).ok
        assert verify(out, reload=False).ok
        opened, _ = structprune.load(out)
        saved = load_file(out / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(dict(opened.named_parameters())[name], saved[name])

    def test_applying_its_plan_is_refused_since_the_values_are_gone(
        self, recovered: tuple[Path, dict[str, Any]], model: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match="the weights were changed after the plan was made"):
            structprune.apply(str(model), tmp_path / "out", recovered[0], writing=Writing(reload=False))
        assert not (tmp_path / "out").exists()


def _masked(folder: Path) -> dict[Key, Tensor]:
    (plan,) = plans_of(folder)
    return {key: plan[key] for key in plan if key.edit == "mask"}
