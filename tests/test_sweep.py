"""Several goals of one command: each has a folder and a name, and what was interrupted is finished."""

from pathlib import Path
from typing import Any

import pytest

import structprune
import structprune.pipeline.prune as prune_module
import structprune.pipeline.sweep as sweep_module
from structprune import prune_each
from structprune.checkpoint.writing import Writing
from structprune.errors import EnvironmentFailure, Interrupted
from tests.conftest import Command
from tests.methods import CALIBRATION, EVALUATION

FILES_ONLY = Writing(reload=False)
# One method looks at the model once for all goals, the other once for each.
METHODS = ("nowag", "wanda")


def recipe_of(model: Path, output: Path, method: str, **more: Any) -> structprune.Recipe:
    keys = {"model": str(model), "output": output, "prune": {"method": method}}
    return structprune.Recipe.model_validate(
        keys | {"calibration": CALIBRATION, "evaluate": EVALUATION} | more
    )


def stop_after(number: int, patch: pytest.MonkeyPatch) -> None:
    """Stop whatever comes after the result with this number, before it is written."""
    for module in (prune_module, sweep_module):
        finish, made = module.finish, []

        def finished(*args: Any, finish: Any = finish, made: list[int] = made, **kwargs: Any) -> Any:
            if len(made) == number:
                raise Interrupted(15)
            made.append(1)
            return finish(*args, **kwargs)

        patch.setattr(module, "finish", finished)


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


@pytest.mark.parametrize("method", METHODS)
def test_the_same_command_finishes_what_was_interrupted_and_keeps_what_was_complete(
    method: str, llama: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(llama, tmp_path / "sw", method)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(Interrupted):
            prune_each(recipe, [0.3, 0.5], writing=FILES_ONLY)
    before = stamps(tmp_path / "sw" / "0.3")
    runs = prune_each(recipe, [0.3, 0.5], writing=FILES_ONLY)["runs"]
    assert {name: run.get("kept", False) for name, run in runs.items()} == {"0.3": True, "0.5": False}
    assert runs["0.3"]["sparsity"] == pytest.approx(0.3, abs=0.01)
    assert stamps(tmp_path / "sw" / "0.3") == before
    again = prune_each(recipe, [0.3, 0.5], writing=FILES_ONLY)["runs"]
    assert [run["kept"] for run in again.values()] == [True, True]
    assert sorted(path.name for path in (tmp_path / "sw").iterdir()) == ["0.3", "0.5"]


@pytest.mark.parametrize("method", METHODS)
def test_results_of_another_run_are_replaced_on_demand_and_those_of_this_one_stay(
    method: str, llama: Path, tmp_path: Path
) -> None:
    prune_each(recipe_of(llama, tmp_path / "sw", method), [0.3], writing=FILES_ONLY)
    other = recipe_of(llama, tmp_path / "sw", method, seed=1)
    with pytest.raises(EnvironmentFailure, match=r"0\.3: exists"):
        prune_each(other, [0.3, 0.5], writing=FILES_ONLY)
    overwrite = Writing(reload=False, overwrite=True)
    assert "kept" not in prune_each(other, [0.3], writing=overwrite)["runs"]["0.3"]
    assert prune_each(other, [0.3], writing=overwrite)["runs"]["0.3"]["kept"]
    anew = Writing(reload=False, overwrite=True, restart=True)
    assert "kept" not in prune_each(other, [0.3], writing=anew)["runs"]["0.3"]


def test_an_older_result_does_not_pass_a_gate_that_it_was_never_held_to(llama: Path, tmp_path: Path) -> None:
    prune_each(recipe_of(llama, tmp_path / "sw", "nowag"), [0.3], writing=FILES_ONLY)
    gated = recipe_of(llama, tmp_path / "sw", "nowag", evaluate=EVALUATION | {"max_ppl_ratio": 0.1})
    with pytest.raises(EnvironmentFailure, match=r"0\.3: exists"):
        prune_each(gated, [0.3], writing=FILES_ONLY)


def test_a_damaged_result_is_not_kept(llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(llama, tmp_path / "sw", "nowag")
    prune_each(recipe, [0.3], writing=FILES_ONLY)
    (tmp_path / "sw" / "0.3" / "config.json").write_text("{}")
    with pytest.raises(EnvironmentFailure, match=r"0\.3: exists"):
        prune_each(recipe, [0.3], writing=FILES_ONLY)


def test_one_goal_written_in_several_ways_is_one_run(command: Command, llama: Path, tmp_path: Path) -> None:
    line = ("prune", llama, tmp_path / "sw", "--method", "magnitude", "--json", "--dry-run")
    found = command(*line, "--sparsity", "0,0.0,0.5,50%,0.50,2:4").json["runs"]
    assert {name: run["output"] for name, run in found.items()} == {
        name: str(tmp_path / "sw" / name) for name in ("0", "0.5", "2:4")
    }
    assert [run["stages"][0]["asked"] for run in found.values()] == [0.0, 0.5, "2:4"]
    assert not list(tmp_path.iterdir())


def test_a_recipe_of_several_goals_spells_out_the_one_that_a_folder_reached(
    llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_of(llama, tmp_path / "sw", "magnitude").text())
    prune_each(structprune.choose_recipe(str(file)), [0.25], writing=FILES_ONLY)
    again = structprune.choose_recipe(str(tmp_path / "sw" / "0.25" / "structprune" / "recipe.yaml"))
    assert again.prune[0].model_dump()["sparsity"] == 0.25
    assert again.output == tmp_path / "sw" / "0.25"


def test_what_was_recovered_is_kept_too(llama: Path, tmp_path: Path) -> None:
    recovery = {"teacher": str(llama), "steps": 2, "check_every": 1, "length": 16, "learning_rate": 1e-3}
    recipe = recipe_of(llama, tmp_path / "sw", "wanda", recover=recovery)
    prune_each(recipe, [0.5], writing=FILES_ONLY)
    before = stamps(tmp_path / "sw" / "0.5")
    runs = prune_each(recipe, [0.5, 0.6], writing=FILES_ONLY)["runs"]
    assert {name: run.get("kept", False) for name, run in runs.items()} == {"0.5": True, "0.6": False}
    assert stamps(tmp_path / "sw" / "0.5") == before
