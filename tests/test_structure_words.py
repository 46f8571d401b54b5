"""What people read of a run after which units are gone: nothing of zeros; defaults as a recipe says them."""

from pathlib import Path

from safetensors.torch import load_file

from structprune.cli.summary import method_lines
from structprune.pipeline.methods import describe
from tests.conftest import Command
from tests.methods import TEXT, short_runs
from tests.specimens import no_fresh_process


def parameters_in(folder: Path) -> int:
    return sum(value.numel() for value in load_file(folder / "model.safetensors").values())


def prune(command: Command, llama: Path, out: Path, method: str) -> tuple[str, str]:
    line = (
        "prune",
        llama,
        out,
        "--method",
        method,
        "--sparsity",
        "0.5",
        "--set",
        "evaluate.generations=false",
    )
    with short_runs(), no_fresh_process():
        done = command(*line, "--calibration", TEXT, "--samples", "2", "--length", "16")
    assert done.code == 0, done.err
    return done.out, (out / "README.md").read_text()


def test_zeros_are_told_of_only_where_there_are_some(llama: Path, command: Command, tmp_path: Path) -> None:
    said, card = prune(command, llama, tmp_path / "units", "block_drop")
    _, zeros = prune(command, llama, tmp_path / "zeros", "magnitude")
    dense, left = (parameters_in(folder) for folder in (llama, tmp_path / "units"))
    share = f"{1 - left / dense:.1%}"
    # Embeddings stay, so a share of the blocks is less of the model.
    assert f"{share} of the model's parameters removed ({dense:,} -> {left:,}), 50% of the prunable" in said
    assert f"{dense - left:,} parameters fewer than the {dense:,} of the dense model, {share} of all" in card
    assert "| block_drop | prunable parameters | 50.00% | 50.00% | 50.00% |" in card
    for words in ("Zeros in the pruned matrices", "Parameters that are not zero"):
        assert words in zeros and words not in card
    assert "no weight was to become zero" in card
    assert "01-block_drop: names and shapes fit the files" in card
    inspected = command("inspect", tmp_path / "units").out
    assert "by structprune with block_drop; no weight of its linears is zero" in inspected


def test_a_goal_that_the_data_decides_is_said_so(llama: Path, command: Command, tmp_path: Path) -> None:
    for method, reachable in {"flap": "the data decides", "block_drop": "0.5"}.items():
        planned = command(
            "prune", llama, tmp_path / "x", "--method", method, "--sparsity", "0.5", "--dry-run"
        )
        assert f"reachable: {reachable}" in planned.out
        assert "unit: prunable parameters" in planned.out
        assert "of the model's" in planned.out


def test_defaults_are_written_as_a_recipe_writes_them() -> None:
    rows = {row["name"]: row["default"] for row in describe("flap")["fields"]}
    assert (rows["repair"], rows["budget"], rows["keep_scores"]) == ("bias", "global", False)
    assert "= false" in method_lines(describe("flap"))
    assert {row["name"]: row["default"] for row in describe("cfsp")["fields"]}["budget"] == "sigmoid"
