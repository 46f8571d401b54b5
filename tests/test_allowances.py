"""What is refused of a model unless a flag allows it, or warned of unless a flag forbids it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import structprune
from structprune import Opening, Writing
from structprune.checkpoint.load import load
from structprune.errors import InputError
from structprune.models.tokenizer import TOKENIZER_FILES, has_tokenizer
from structprune.recipe.recipe import Recipe
from tests.checkpoints import change_index, write
from tests.damage import Q
from tests.methods import CALIBRATION, EVALUATION

FILE = "model.safetensors"
NORM = "model.norm.weight"
FLAT = {"calibration": CALIBRATION, "evaluate": EVALUATION, "writing": Writing(reload=False)}


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """Return a copy of a tiny Llama that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


@pytest.fixture
def with_surprise(copy: Path) -> Path:
    """Return a model with a tensor that its class does not know."""
    save_file(load_file(copy / FILE) | {"model.surprise": torch.ones(2, 2)}, copy / FILE, {"format": "pt"})
    return copy


@pytest.fixture
def with_nan(copy: Path) -> Path:
    """Return a model with a NaN in its last norm."""
    tensors = load_file(copy / FILE)
    tensors[NORM][0] = torch.nan
    save_file(tensors, copy / FILE, {"format": "pt"})
    return copy


def test_a_tensor_that_nobody_knows_is_passed_over_with_a_warning_unless_strict(with_surprise, command):
    for name in ("inspect", "verify"):
        lenient, strict = command(name, with_surprise), command(name, with_surprise, "--strict")

        assert lenient.code == 0, lenient.err
        assert "passed over: model.surprise" in lenient.err
        assert strict.code == 3
        assert "model.surprise" in strict.err


def test_a_command_that_writes_is_strict_by_itself(with_surprise, command, tmp_path):
    for flags in ([], ["--strict"]):
        done = command("prune", with_surprise, tmp_path / "out", "--method", "magnitude", *flags)

        assert done.code == 3
        assert "model.surprise" in done.err


def test_a_tensor_beside_the_index_is_passed_over_unless_strict(tmp_path, command):
    folder = write(tmp_path / "model", shards=3)
    change_index(folder, **{Q: None})

    assert "not in the index" in command("inspect", folder).err
    assert command("inspect", folder).code == 0
    assert command("inspect", folder, "--strict").code == 3


def test_values_that_are_not_finite_are_accepted_when_told(with_nan, command):
    refused, accepted = command("inspect", with_nan), command("inspect", with_nan, "--allow-nonfinite")

    assert refused.code == 3
    assert f"'{NORM}' holds 1 NaN" in refused.err
    assert "--allow-nonfinite" in refused.err
    assert accepted.code == 0
    assert NORM in accepted.err


def test_a_folder_with_values_that_are_not_finite_can_be_verified_when_told(with_nan, command):
    assert command("verify", with_nan).code == 6
    done = command("verify", with_nan, "--allow-nonfinite")
    assert "allowed: NaN or infinity in 1 of" in done.out


def test_the_tokenizer_of_another_folder_is_used_and_copied_where_the_model_has_none(copy, llama, tmp_path):
    for name in (*TOKENIZER_FILES, "special_tokens_map.json"):
        (copy / name).unlink(missing_ok=True)
    assert not has_tokenizer(copy)
    out = tmp_path / "out"
    with pytest.raises(InputError, match="--tokenizer"):
        structprune.prune(str(copy), out, "wanda", **FLAT)

    recipe = Recipe(
        model=str(copy),
        output=out,
        prune="wanda",
        tokenizer=str(llama),
        **{key: FLAT[key] for key in ("calibration", "evaluate")},
    )
    report = structprune.prune(recipe, writing=FLAT["writing"])

    assert report["verification"]["ok"]
    assert (out / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    assert load(out)[1] is not None


def test_the_tokenizer_of_a_model_stays_its_own_file(copy, llama, tmp_path):
    changed = (copy / "tokenizer_config.json").read_text() + "\n"
    (copy / "tokenizer_config.json").write_text(changed)

    structprune.prune(str(copy), tmp_path / "out", "magnitude", tokenizer=str(llama), **FLAT)

    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == changed


def test_a_folder_without_a_tokenizer_is_no_tokenizer(llama, tmp_path, command):
    done = command("evaluate", llama, "--tokenizer", tmp_path)

    assert done.code == 3
    assert str(tmp_path) in done.err


def test_a_model_that_is_pruned_already_is_refused_when_told(llama, tmp_path, command):
    structprune.prune(str(llama), tmp_path / "half", "magnitude", sparsity=0.5, **FLAT)
    line = ("prune", tmp_path / "half", tmp_path / "out", "--method", "magnitude", "--sparsity", "0.7")

    done = command(*line, "--from-dense")

    assert done.code == 3
    assert "pruned already" in done.err
    assert Opening().from_dense is False
