"""Costs are counted on the meta device, and agree with what can be worked out by hand."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from structprune.models.cost import Cost, count, default_length, weight_bytes
from tests.tiny import FAMILIES, save_tiny, tiny

# Every family of tests/tiny.py: hidden 64, 4 heads, 2 blocks, vocabulary 320.
HEAD = 64 * 320
ATTENTION = 64 * 64 + 2 * 64 * 32 + 64 * 64  # q, k and v of 2 groups of 16, o
GATED = 3 * 64 * 96


class LooksIntoValues(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden if hidden.sum() > 0 else -hidden


def scores_and_mix(length: int, width: int = 64) -> int:
    """FLOPs per token of both products of full attention over `length` tokens, in two blocks."""
    return 2 * 2 * 2 * length * width


def test_a_llama_costs_two_flops_per_weight_plus_attention() -> None:
    cost = count(tiny("llama"), length=32)
    assert cost.flops_per_token == 2 * (2 * (ATTENTION + GATED) + HEAD) + scores_and_mix(32)
    assert cost.parameters == 2 * (ATTENTION + GATED + 2 * 64) + 64 + 2 * HEAD
    assert cost.length == 32


def test_only_the_chosen_experts_of_a_mixture_are_counted() -> None:
    cost = count(tiny("mixtral"), length=32)
    router = 64 * 4
    assert cost.flops_per_token == 2 * (2 * (ATTENTION + router + 2 * GATED) + HEAD) + scores_and_mix(32)


def test_a_wider_head_and_tied_embeddings_are_counted_as_they_are() -> None:
    model = tiny("gemma2")  # head_dim 24
    cost = count(model, length=32)
    attention = 64 * 96 + 2 * 64 * 48 + 96 * 64
    assert cost.flops_per_token == 2 * (2 * (attention + GATED) + HEAD) + scores_and_mix(32, width=96)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_cache_holds_a_key_and_a_value_per_block_and_group_in_the_models_dtype() -> None:
    assert count(tiny("llama"), length=32).kv_bytes_per_token == 2 * 2 * (2 * 16) * 4
    assert count(tiny("llama", dtype=torch.bfloat16), length=32).kv_bytes_per_token == 2 * 2 * (2 * 16) * 2


def test_a_sliding_window_stops_growing() -> None:
    per_block = 2 * (2 * 24) * 4
    cost = count(tiny("gemma2"), length=64)
    # The new token itself is the sixteenth of the window of 16.
    assert cost.kv_bytes_per_token == per_block + per_block * 15 / 64


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted_from_its_real_shapes(family: str) -> None:
    cost = count(tiny(family), length=16)
    assert cost.flops_per_token
    assert 2 * HEAD < cost.flops_per_token < 2 * cost.parameters + scores_and_mix(16, width=96)
    assert cost.kv_bytes_per_token


def test_counting_leaves_the_model_as_it_was() -> None:
    model = tiny("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    count(model, length=8)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_model_that_looks_into_values_is_reported_as_uncounted(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    model.model.norm = LooksIntoValues()
    with caplog.at_level(logging.WARNING):
        cost = count(model, length=8)
    assert cost.flops_per_token is None
    assert cost.kv_bytes_per_token is None
    assert cost.parameters > 0
    assert "LlamaForCausalLM cannot be counted: Tensor.item()" in caplog.text


def test_a_streamed_models_skeleton_is_counted_like_the_model() -> None:
    model = tiny("qwen3")
    skeleton = tiny("qwen3").to("meta")
    assert count(SimpleNamespace(skeleton=skeleton), length=16) == count(model, length=16)


def test_the_length_is_at_most_what_the_model_was_made_for() -> None:
    model = tiny("gpt2")
    assert default_length(model) == 128
    assert count(model).length == 128
    model.config.n_positions = 131072
    assert default_length(model) == 2048


def test_sparsity_is_zeros_over_the_prunable_set() -> None:
    cost = count(tiny("llama"), zeros=25, prunable=100, length=8)
    assert cost.sparsity == 0.25
    assert Cost(1, 0, 0, 0.0, 0.0, 0, 1).sparsity == 0.0


def test_bytes_on_disk_are_those_of_the_weight_files(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, shards=2)
    files = list(folder.glob("model-*.safetensors"))
    assert len(files) > 1
    assert weight_bytes(folder) == sum(len(file.read_bytes()) for file in files)
