"""A cut model is written, and opens: with structprune, and with plain transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from structprune.checkpoint.export import export
from structprune.decide.units import block_members, unit_tensors
from structprune.models.arch import arch_of, blocks
from structprune.models.edit import carry_out
from structprune.models.edited_reader import EditedReader
from structprune.models.groups import BlockKeep, block_sizes, kv_groups
from structprune.models.identity import architecture_of, names_of, skeleton
from structprune.models.masking import masked
from structprune.models.native import CONFIG_KEY, depth_patch, sizes_patch
from structprune.models.opening import Opening
from structprune.models.streamed import StreamedModel, open_model
from structprune.plan.origin import Origin
from structprune.plan.plan import Plan, PlanWriter
from structprune.progress import silent
from tests.test_models_groups import keep_of, logits
from tests.tiny import FAMILIES, save_tiny, tokens


def plan_of(model: PreTrainedModel | StreamedModel, keeps: list[BlockKeep]) -> Plan:
    names, module = names_of(model), skeleton(model)
    arch = arch_of(module)
    writer = PlanWriter(None, Origin("cut", {}, architecture_of(model), ""))
    found = blocks(module, arch)
    for (prefix, block), keep in zip(found, keeps, strict=True):
        writer.write(unit_tensors(prefix, block, arch, keep, names), {})
    return writer.finish({})


def patched(plan: Plan, model: PreTrainedModel) -> Plan:
    arch = arch_of(model)
    sizes = [block_sizes(block, arch) for _, block in blocks(model, arch)]
    return Plan(plan.origin, plan.blocks, facts={}, patch=sizes_patch(model.config, sizes))


def plain(folder: Path, trust: bool) -> PreTrainedModel:
    last: Exception | None = None
    for factory in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            return factory.from_pretrained(folder, trust_remote_code=trust, dtype=torch.float32).eval()
        except ValueError as error:
            last = error
    raise last


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["mixed", "skipped", "uniform"])
def test_it_opens_everywhere_with_the_same_logits(family: str, what: str, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "dense")
    model = open_model(source, Opening(stream=False))
    arch = arch_of(model)
    sizes = [block_sizes(block, arch) for _, block in blocks(model, arch)]
    keeps = [keep_of(one, odd=bool(index)) for index, one in enumerate(sizes)]
    if what == "skipped":
        keeps = [BlockKeep(attention=False), BlockKeep(mlp=False)]
    elif what == "uniform":
        keeps = [keep_of(one, odd=True) for one in sizes]
    plan = plan_of(model, keeps)
    carry_out(model, plan)
    plan = patched(plan, model)
    expected = logits(model)
    streamed = open_model(source, Opening(stream=True))
    reader = EditedReader(streamed.reader, plan)
    out = tmp_path / "out"
    out.mkdir()
    export(reader, out, silent)
    ours = open_model(out, Opening(stream=False))
    assert torch.equal(logits(ours), expected)
    assert architecture_of(ours) == architecture_of(model)
    code = CONFIG_KEY in plan.patch
    assert list(out.glob("*.py")) != [] if code else not list(out.glob("*.py"))
    if code:
        with pytest.raises(ValueError, match="trust_remote_code"):
            plain(out, trust=False)
    assert torch.equal(logits(plain(out, trust=code)), expected)


ROPES: dict[str, dict[str, object]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 32,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def llama_of_three_groups(folder: Path, out: Path, **fields: object) -> dict[str, object]:
    """Write a Llama of 8 heads in 4 groups and what three of the groups leave; return its configuration."""
    sizes: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, **sizes, **fields
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    model = open_model(folder, Opening(stream=False))
    arch = arch_of(model)
    keep = [kv_groups(block_sizes(block, arch), torch.tensor([0, 2, 3])) for _, block in blocks(model, arch)]
    plan = plan_of(model, keep)
    carry_out(model, plan)
    plan = patched(plan, model)
    expected = logits(model)
    out.mkdir()
    export(EditedReader(open_model(folder, Opening(stream=True)).reader, plan), out, silent)
    ours = open_model(out, Opening(stream=False))
    assert torch.equal(logits(ours), expected)
    assert architecture_of(ours) == architecture_of(open_model(out, Opening(stream=True)))
    trust = CONFIG_KEY in plan.patch
    assert torch.equal(logits(plain(out, trust)), expected)
    return json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_whose_heads_do_not_divide_opens_as_a_mistral(rope: str, tied: bool, tmp_path: Path) -> None:
    found = llama_of_three_groups(
        tmp_path / "dense", tmp_path / "out", tie_word_embeddings=tied, rope_parameters=ROPES[rope]
    )
    assert found["model_type"] == "mistral"
    assert found["sliding_window"] is None
    assert (found["num_attention_heads"], found["num_key_value_heads"], found["head_dim"]) == (6, 3, 8)


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_llama_with_biases_stays_one_and_is_listed(bias: str, tmp_path: Path) -> None:
    found = llama_of_three_groups(tmp_path / "dense", tmp_path / "out", **{bias: True})
    assert found["model_type"] == "pruned_llama"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [[0], [1]])
def test_fewer_blocks_open_as_the_family_and_equal_the_masked_model(
    family: str, kept: list[int], tmp_path: Path
) -> None:
    source = save_tiny(family, tmp_path / "dense")
    model = open_model(source, Opening(stream=False))
    arch = arch_of(model)
    found = blocks(model, arch)
    with masked(model, {1 - kept[0]: BlockKeep(block=False)}):
        expected = logits(model)
    writer = PlanWriter(None, Origin("cut", {}, architecture_of(model), ""))
    writer.write(block_members(torch.tensor(kept), found, names_of(model)), {})
    sizes = [block_sizes(block, arch) for _, block in found]
    plan = writer.finish({}, patch=depth_patch(model.config, kept, sizes))
    reader = EditedReader(open_model(source, Opening(stream=True)).reader, plan)
    carry_out(model, plan)
    assert torch.allclose(logits(model), expected, rtol=1e-5, atol=1e-6)
    (out := tmp_path / "out").mkdir()
    export(reader, out, silent)
    ours = open_model(out, Opening(stream=False))
    assert torch.equal(logits(ours), logits(model))
    assert architecture_of(ours) == architecture_of(model)
    assert torch.equal(logits(plain(out, trust=False)), logits(model))
    prompt = tokens(model, length=5)
    lines = [one.generate(**prompt, max_new_tokens=6, do_sample=False) for one in (model, ours)]
    assert torch.equal(*lines)
