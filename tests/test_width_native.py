"""Blocks of equal widths: the family's own configuration says them, and its own class opens the result."""

from pathlib import Path
from typing import Any

import pytest
import torch

from structprune.checkpoint.export import export
from structprune.errors import QualityError, UsageError
from structprune.models.edited_reader import EditedReader
from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.models.streamed import open_model
from structprune.progress import silent
from structprune.pruners.catalogue import find
from structprune.pruners.forecast import forecast_all
from structprune.storage.reader import CheckpointReader
from tests.conftest import Command
from tests.test_models_shapes import plain
from tests.tiny import FAMILIES, save_tiny, tiny, tokens

# Of these only attention can leave here.
MIXTURES = {"mixtral", "qwen2_moe", "qwen3_moe"}
REFIT: dict[str, Any] = {"repair": "least_squares", "sparsity": 0.4}


def written(method: str, family: str, folder: Path, **fields: Any) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Prune a tiny model and write it.

    Returns:
        Logits of the pruned model, and of the one that plain transformers opens without trusting anybody;
        whether the folder has code of ours.
    """
    source = save_tiny(family, folder / "dense")
    model, data = open_model(source, Opening()), [tokens(tiny(family), seed=seed) for seed in range(2)]
    pruner = find(method)(**fields)
    plan = pruner.calibrate(model, data)
    (out := folder / "out").mkdir()
    export(EditedReader(CheckpointReader(source), plan), out, silent)
    here = logits(pruner.apply(model, plan), data[0])
    code = bool(list(out.glob("*.py")))
    return here, here if code else plain(out, trust=False)(**data[0]).logits, code


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in MIXTURES])
@pytest.mark.parametrize("fields", [REFIT, {"sparsity": 0.4}], ids=["refit", "none"])
def test_padded_blocks_say_what_unequal_ones_say(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    made = {}
    for native in (None, "pad"):
        (folder := tmp_path / str(native)).mkdir()
        made[native] = written(
            "random_units", family, folder, native=native, budget="global", seed=3, **fields
        )
    (expected, _, code), (found, opened, padded_code) = made[None], made["pad"]
    assert code and not padded_code
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(opened.float(), found, atol=1e-6)


def test_nothing_is_padded_where_a_block_lost_nothing() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 100
    pruner = find("magnitude_units")(native="pad", budget="global", units=["channel"], sparsity=0.3)
    with pytest.raises(QualityError, match="some block lost nothing"):
        pruner.calibrate(model, [])


@pytest.mark.parametrize("method", ["flap", "cfsp", "wanda_sp"])
def test_uniform_needs_no_code_whatever_the_methods_own_budget_is(method: str, tmp_path: Path) -> None:
    found, opened, code = written(method, "llama", tmp_path, native="uniform", **REFIT)
    assert not code
    assert torch.equal(found, opened)
    (forecast,) = forecast_all([find(method)(native="uniform", **REFIT)], tiny("llama"))
    assert forecast.exact


@pytest.mark.parametrize("native", ["uniform", "pad"])
def test_a_bias_stays_where_the_family_has_one_and_is_refused_where_not(native: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"native": native, "units": ["channel"], "sparsity": 0.3}
    found, opened, code = written("flap", "opt", tmp_path, **fields)
    assert not code
    assert torch.equal(found, opened)
    with pytest.raises(UsageError, match="no place for the biases") as refused:
        forecast_all([find("flap")(**fields)], tiny("llama"))
    assert "least_squares" in str(refused.value.hint)


def test_heads_that_a_configuration_cannot_say_are_refused_or_padded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot say the heads") as refused:
        forecast_all([find("wanda_sp")(native="uniform", sparsity=0.25)], tiny("gpt2"))
    assert "pad" in str(refused.value.hint)
    *_, code = written("wanda_sp", "gpt2", tmp_path, native="pad", budget="global", sparsity=0.4)
    assert not code


@pytest.mark.parametrize(("more", "told"), [([], True), (["--uniform", "--set", "repair=none"], False)])
def test_that_blocks_will_be_unequal_is_said_before(
    more: list[str], told: bool, command: Command, llama: Path, tmp_path: Path
) -> None:
    done = command(
        "prune", llama, tmp_path / "out", "--method", "flap", "--dry-run", "--sparsity", "0.4", *more
    )
    assert done.code == 0
    assert ("blocks of unequal width" in done.err) is told
    assert ("trust_remote_code" in done.out) is told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--uniform", "--pad"], "give one of them"),
        (["--uniform"], "least_squares"),
        (["--uniform", "--set", "budget=global"], "does not go with budget"),
        (["--pad", "--set", "skip=1", "--set", "repair=none"], "skip leaves whole"),
    ],
)
def test_what_cannot_be_both_is_refused(
    words: list[str], said: str, command: Command, llama: Path, tmp_path: Path
) -> None:
    done = command("prune", llama, tmp_path / "out", "--method", "flap", *words, "--json")
    assert (done.code, done.json["error"]["kind"]) == (2, "usage")
    assert said in done.json["error"]["message"] + done.json["error"]["hint"]
