"""The table of families: every weight matrix of a block is found, seen as [out, in], and nothing else is."""

import logging

import pytest
import torch
from torch import nn
from transformers import (
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from structprune.errors import InputError
from structprune.models.arch import Arch, Linear, arch_of, block_prefixes, blocks, known_types, linears
from tests.tiny import CONFIGS, FAMILIES, GROUPED, tiny

# Linears of one block: attention (4, or 2 where fused) + feed-forward, or 2 per expert + shared.
LINEARS = {
    "phi3": 4,
    "opt": 6,
    "gpt2": 4,
    "gpt_neox": 4,
    "mixtral": 4 + 2 * 4,
    "qwen2_moe": 4 + 2 * 4 + 3,
    "qwen3_moe": 4 + 2 * 4,
}


def block_linears(model: PreTrainedModel, index: int = 1) -> tuple[list[Linear], Arch]:
    arch = arch_of(model)
    return linears(*blocks(model)[index], arch), arch


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_in_the_table_and_has_two_blocks(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(family)
    arch = arch_of(model)
    assert not arch.fallback
    assert not caplog.records
    assert block_prefixes(model) == [f"{arch.blocks}.0", f"{arch.blocks}.1"]
    assert [module for _, module in blocks(model)] == [
        model.get_submodule(prefix) for prefix in block_prefixes(model)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_block_is_a_linear_except_routers(family: str) -> None:
    model = tiny(family)
    found, arch = block_linears(model)
    assert len(found) == LINEARS.get(family, 7)
    assert len({linear.label for linear in found}) == len(found)
    prefix, block = blocks(model)[1]
    matrices = {f"{prefix}.{name}" for name, weight in block.named_parameters() if weight.ndim >= 2}
    routers = {f"{prefix}.{router}.weight" for router in arch.routers}
    assert {linear.name for linear in found} == matrices - routers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_in_the_table_are_modules_of_the_block(family: str) -> None:
    model = tiny(family)
    arch = arch_of(model)
    block = blocks(model)[0][1]
    dense = (arch.gate, arch.up, arch.down) if not arch.experts else ()
    named = [arch.attention, arch.mlp, arch.q, arch.k, arch.v, arch.qkv, arch.o, arch.gate_up, *dense]
    for path in filter(None, [*named, arch.experts, arch.shared_expert, *arch.routers]):
        assert isinstance(block.get_submodule(path), nn.Module), path
    if arch.experts:
        experts = block.get_submodule(arch.experts)
        assert (
            experts.get_parameter(arch.expert_gate_up).ndim
            == experts.get_parameter(arch.expert_down).ndim
            == 3
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_to_a_weight_changes_the_model_in_that_place_only(family: str) -> None:
    model = tiny(family)
    for linear in block_linears(model)[0]:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        linear.weight[0, -1] = 7.0
        changed = {
            name: tensor for name, tensor in model.state_dict().items() if not tensor.equal(before[name])
        }
        assert list(changed) == [linear.name]
        assert int((changed[linear.name] != before[linear.name]).sum()) == 1
        assert linear.view(changed[linear.name])[0, -1] == 7.0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_a_weight_maps_the_input_of_its_module_to_its_output(family: str) -> None:
    for linear in block_linears(tiny(family))[0]:
        inputs = torch.randn(5, linear.weight.shape[1])
        bias = linear.module.get_parameter("bias") if family != "llama" else None
        expected = nn.functional.linear(inputs, linear.weight, bias)
        assert torch.allclose(linear.module(inputs), expected, atol=1e-5)


def test_an_expert_is_a_slice_of_the_fused_parameter() -> None:
    model = tiny("mixtral")
    found = {linear.label: linear for linear in block_linears(model)[0]}
    down = found["model.layers.1.mlp.experts.down_proj[2]"]
    fused = model.state_dict()["model.layers.1.mlp.experts.down_proj"]
    assert down.name == "model.layers.1.mlp.experts.down_proj"
    assert down.expert == 2
    assert down.module is model.get_submodule("model.layers.1.mlp.experts")
    assert torch.equal(down.weight, fused[2])
    assert down.weight.data_ptr() == fused[2].data_ptr()
    labels = [label for label in found if "experts" in label]
    assert [label.rpartition(".")[2] for label in labels[:4]] == [
        "gate_up_proj[0]",
        "down_proj[0]",
        "gate_up_proj[1]",
        "down_proj[1]",
    ]


def test_a_weight_is_seen_as_outputs_by_inputs_however_it_is_kept() -> None:
    plain = Linear("a.weight", "a", nn.Linear(3, 2))
    transposed = Linear("a.weight", "a", nn.Linear(2, 3), transposed=True)
    assert plain.weight.shape == transposed.weight.shape == (2, 3)


def test_the_shared_expert_is_pruned_but_its_gate_and_the_router_are_not() -> None:
    labels = {linear.label for linear in block_linears(tiny("qwen2_moe"))[0]}
    assert "model.layers.1.mlp.shared_expert.down_proj" in labels
    assert not any(label.endswith((".gate", ".shared_expert_gate")) for label in labels)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_vision_tower_of_a_vlm_is_untouched(family: str) -> None:
    names = [linear.name for linear in block_linears(tiny(family))[0]]
    assert all(name.startswith("model.language_model.layers.1.") for name in names)


def test_the_language_model_inside_a_llava_may_be_another_family() -> None:
    config = CONFIGS["llava"]()
    assert isinstance(config, LlavaConfig)
    config.text_config = CONFIGS["opt"]()
    found, arch = block_linears(LlavaForConditionalGeneration(config))
    assert (arch.blocks, arch.up) == ("model.language_model.decoder.layers", "fc1")
    assert len(found) == 6


def test_an_unknown_type_falls_back_to_its_repeated_blocks_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = GlmConfig(**GROUPED, head_dim=16)
    model = GlmForCausalLM(config)
    with caplog.at_level(logging.WARNING):
        arch = arch_of(model)
    assert arch.fallback
    assert "'glm'" in caplog.text
    assert "'model.layers'" in caplog.text
    names = [
        linear.label.removeprefix("model.layers.0.") for linear in linears(*blocks(model, arch)[0], arch)
    ]
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    assert names == [*attention, "mlp.gate_up_proj", "mlp.down_proj"]


def test_an_unknown_mixture_of_experts_keeps_its_linear_router() -> None:
    block = nn.ModuleDict({"gate": nn.Linear(8, 4), "gate_proj": nn.Linear(8, 8), "score": nn.Linear(8, 1)})
    found = linears("blocks.0", block, Arch(("unheard",), blocks="blocks", fallback=True))
    assert [linear.label for linear in found] == ["blocks.0.gate_proj"]


def test_a_model_without_repeated_blocks_is_refused_with_the_known_types(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("llama")
    monkeypatch.setattr(LlamaConfig, "model_type", "flat")
    model.set_submodule("model.layers", nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)]))
    with pytest.raises(InputError, match=r"'flat' is not known.*gemma2.*qwen3_moe"):
        arch_of(model)
    assert known_types() == sorted(known_types())
