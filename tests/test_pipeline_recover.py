"""Recovery of a pruned folder: its plans are its masks, and what is written holds them to the last weight."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import structprune
from structprune.checkpoint.writing import Writing
from structprune.errors import InputError, QualityError
from structprune.models.opening import Opening
from structprune.models.streamed import open_model
from structprune.pruners.catalogue import find
from structprune.recipe.recipe import EvaluateOptions, RecoverOptions
from tests.tiny import save_tiny

EVALUATION = EvaluateOptions(text=("demo",), windows=2, length=32, generations=False)
CPU = Opening(device="cpu")
TEXT = "".join(f"{number} follows {number - 1}, and {number + 1} comes next. " for number in range(1, 400))
TRAINING: dict[str, Any] = {"steps": 24, "check_every": 8, "length": 32, "learning_rate": 1e-2, "rank": 4}


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    """Return where each parameter of a folder is zero."""
    model = open_model(folder)
    return {name: value.detach() == 0 for name, value in model.named_parameters()}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recover")
    source = save_tiny("llama", folder / "dense", dtype=torch.bfloat16)
    (folder / "text.txt").write_text(TEXT)
    structprune.prune(
        source,
        folder / "pruned",
        find("wanda")(sparsity="2:4"),
        calibration={"samples": 6, "length": 32},
        evaluate=EVALUATION,
        writing=Writing(reload=False),
    )
    return folder


def recover(pruned: Path, output: Path, **training: Any) -> dict[str, Any]:
    options = RecoverOptions(data=str(pruned / "text.txt"), **TRAINING | training)
    return structprune.recover(
        str(pruned / "pruned"),
        output,
        options,
        opening=CPU,
        evaluate=EVALUATION,
        writing=Writing(reload=False),
    )


def test_recovery_lowers_the_held_out_loss_and_moves_no_zero(pruned: Path, tmp_path: Path) -> None:
    report = recover(pruned, tmp_path / "out")
    assert report["recovery"]["best_loss"] < report["recovery"]["start_loss"]
    assert report["recovery"]["masks"] == "plans"
    assert report["sparsity"] == 0.5 and report["pattern"] == "2:4"
    before, after = zeros(pruned / "pruned"), zeros(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    weights = [(tmp_path / "out" / "model.safetensors"), (pruned / "pruned" / "model.safetensors")]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    checked = structprune.verify(tmp_path / "out", str(pruned / "pruned"))
    assert checked["ok"], checked["checks"]


def test_a_kept_adapter_opens_to_the_weights_that_merging_writes(pruned: Path, tmp_path: Path) -> None:
    recover(pruned, tmp_path / "merged")
    report = recover(pruned, tmp_path / "adapter", keep_adapter=True)
    assert report["adapter"]["base"] == str(pruned / "pruned")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    merged, _ = structprune.load(tmp_path / "merged")
    opened, tokenizer = structprune.load(tmp_path / "adapter")
    assert tokenizer is not None
    for (name, one), other in zip(merged.named_parameters(), opened.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_an_adapter_whose_base_has_changed_is_refused(pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned / "pruned", tmp_path / "base")
    options = RecoverOptions(data=str(pruned / "text.txt"), keep_adapter=True, **TRAINING)
    structprune.recover(
        str(tmp_path / "base"), tmp_path / "adapter", options, opening=CPU, evaluate=EVALUATION
    )
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(InputError, match="is not there"):
        structprune.load(tmp_path / "adapter")
    save_tiny("llama", tmp_path / "base", seed=3, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="trained on weights"):
        structprune.load(tmp_path / "adapter")


def test_nothing_is_written_when_nothing_beats_the_start(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(QualityError):
        # A step far below what bfloat16 can hold changes nothing, so nothing can be better.
        recover(pruned, tmp_path / "out", learning_rate=1e-12, steps=4, check_every=4)
    assert not list(tmp_path.iterdir())
