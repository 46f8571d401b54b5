"""Blocks of equal widths: the family's own configuration says them, and its own class opens the result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
from tests.tiny import FAMILIES, GROUPED, save_tiny, tiny, tokens

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
def test_a_bias_stays_where_the_family_has_one(native: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"native": native, "units": ["channel"], "sparsity": 0.3}
    found, opened, code = written("flap", "opt", tmp_path, **fields)
    assert not code
    assert torch.equal(found, opened)


ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
HOLDING = {
    "llama": (["kv_group", "channel"], ATTENTION | MLP),
    "llama, channels": (["channel"], MLP),
    "qwen3, groups": (["kv_group"], ATTENTION),
    "gemma2, groups": (["kv_group"], ATTENTION),
}


@pytest.mark.parametrize("case", HOLDING)
@pytest.mark.parametrize("native", ["uniform", "pad"])
def test_a_bias_stays_where_the_configuration_can_give_it_to_all_linears_beside(
    case: str, native: str, tmp_path: Path
) -> None:
    units, biased = HOLDING[case]
    family = case.partition(",")[0]
    fields = {"units": units, "sparsity": 0.5, "budget": "uniform" if native == "uniform" else "global"}
    made = {}
    for way in (None, native):
        (folder := tmp_path / str(way)).mkdir()
        made[way] = written("flap", family, folder, native=way, **fields)
    (expected, _, unequal), (found, opened, code) = made[None], made[native]
    assert unequal and not code
    assert torch.equal(found, opened)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)

    reader = CheckpointReader(tmp_path / native / "out")
    flags = {"attention_bias": biased >= ATTENTION, "mlp_bias": biased >= MLP}
    assert {key: reader.config.get(key) or False for key in flags} == flags
    prefix = "model.layers.0."
    there = {name for name in reader.tensors if name.startswith(prefix) and name.endswith(".bias")}
    assert there == {f"{prefix}{path}.bias" for path in biased}
    zero = {path for path in biased if not reader.read(f"{prefix}{path}.bias").any()}
    assert zero >= biased - {"self_attn.o_proj", "mlp.down_proj"}
    assert biased != zero


@pytest.mark.parametrize(
    ("family", "path"), [("mistral", "mlp.down_proj"), ("qwen3", "mlp.down_proj"), ("phi3", "mlp.down_proj")]
)
@pytest.mark.parametrize("native", ["uniform", "pad"])
def test_a_bias_that_the_configuration_cannot_give_is_refused(native: str, family: str, path: str) -> None:
    with pytest.raises(UsageError, match=f"{family} has no place for the bias of {path}") as refused:
        forecast_all([find("flap")(native=native, sparsity=0.3)], tiny(family))
    assert "least_squares" in str(refused.value.hint)


def test_heads_that_only_a_family_without_biases_could_say_are_refused_with_a_bias() -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**GROUPED | heads, architectures=["LlamaForCausalLM"]))
    fields: dict[str, Any] = {"native": "uniform", "units": ["kv_group"], "sparsity": 0.125}
    with pytest.raises(UsageError, match="heads that would be left beside the biases") as refused:
        forecast_all([find("flap")(**fields)], model)
    assert "least_squares" in str(refused.value.hint)
    assert forecast_all([find("flap")(repair="least_squares", **fields)], model)[0].exact


@pytest.mark.parametrize("units", [["kv_group", "channel"], ["channel"]], ids=str)
def test_new_biases_count_for_what_is_to_be_left(units: list[str]) -> None:
    model = tiny("llama")
    target = sum(parameter.numel() for parameter in model.parameters()) * 7 // 10
    pruner = find("flap")(native="uniform", target_params=target, units=units)
    (forecast,) = forecast_all([pruner], model)
    left = sum(parameter.numel() for parameter in forecast.left.parameters())
    # Both blocks lose the same, and a channel is three times as many weights as the model is wide, and two.
    assert abs(left - target) <= 2 * (3 * 64 + 2) / 2


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
