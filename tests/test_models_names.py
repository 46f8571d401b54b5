"""Names in the files and names in the model: both ways, bit for bit, for what real folders hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    PreTrainedModel,
    core_model_loading,
)

from structprune.errors import EnvironmentFailure, InputError
from structprune.models.arch import all_linears
from structprune.models.identity import names_of, stored_names
from structprune.models.names import Names
from tests.tiny import FAMILIES, tiny

Shapes = dict[str, tuple[int, ...]]


def shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def saved(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def renamed(tensors: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new, 1) if name.startswith(old) else name: one for name, one in tensors.items()}


@pytest.mark.parametrize(
    "from_files", [True, False], ids=["names found in files", "names of save_pretrained"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_to_stored_is_what_save_pretrained_writes_and_to_module_undoes_it(
    family: str, from_files: bool, tmp_path: Path
) -> None:
    model = tiny(family)
    state, disk = model.state_dict(), saved(model, tmp_path)
    names = Names(model, shapes(disk) if from_files else None)
    assert names.expected() == shapes(disk)
    assert same(names.to_stored(state), disk)
    assert same(names.to_module(disk), state)
    assert names.module_of.keys() == disk.keys()
    assert names.stored_of.keys() == state.keys()
    assert not names.duplicates


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_one_block_survive_the_way_there_and_back(family: str) -> None:
    model = tiny(family)
    names = Names(model)
    block = {name: t > 0 for name, t in model.state_dict().items() if ".layers.1." in name or ".h.1." in name}
    stored = names.to_stored(block)
    assert {mask.dtype for mask in stored.values()} == {torch.bool}
    assert set(stored) == {name for key in block for name in names.stored_of[key]}
    assert same(names.to_module(stored), block)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_5_vl"])
def test_shapes_are_converted_on_the_meta_device(family: str) -> None:
    model = tiny(family)
    names = Names(model)
    meta = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    assert shapes(names.to_stored(meta)) == names.expected()


def test_the_experts_of_a_mixtral_lie_where_they_belong() -> None:
    model = tiny("mixtral")
    gate_up = "model.layers.1.mlp.experts.gate_up_proj"
    tensor = torch.arange(4 * 192 * 64).view(4, 192, 64)
    stored = Names(model).to_stored({gate_up: tensor})
    assert len(stored) == 8
    prefix = "model.layers.1.block_sparse_moe.experts.2"
    assert torch.equal(stored[f"{prefix}.w1.weight"], tensor[2, :96])
    assert torch.equal(stored[f"{prefix}.w3.weight"], tensor[2, 96:])


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_an_experts_own_tensors_are_those_that_the_conversion_puts_it_into(family: str) -> None:
    model = tiny(family)
    names = names_of(model)
    for linear in (one for block in all_linears(model) for one in block if one.expert is not None):
        marked = torch.zeros_like(linear.whole, dtype=torch.bool)
        linear.view(marked).fill_(True)
        own = {part for part, mark in names.to_stored({linear.name: marked}).items() if bool(mark.any())}
        assert 0 < len(own) < len(names.stored_of[linear.name])
        assert set(stored_names(names, [linear])) == own


def test_ten_and_more_experts_stay_in_numerical_order() -> None:
    stored = {
        f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight": torch.full((64, 96), e) for e in range(12)
    }
    model = tiny("mixtral")
    experts = model.get_submodule("model.layers.0.mlp.experts")
    experts.down_proj = torch.nn.Parameter(torch.empty(12, 64, 96))
    down = Names(model, shapes(stored)).to_module(stored)["model.layers.0.mlp.experts.down_proj"]
    assert down[:, 0, 0].tolist() == list(range(12))


LEGACY = {
    "gpt2 without its prefix": ("gpt2", [("transformer.", "")]),
    "llama saved by its base model": ("llama", [("model.", "")]),
    "llava of 2023": (
        "llava",
        [
            ("lm_head", "language_model.lm_head"),
            ("model.language_model", "language_model.model"),
            ("model.vision_tower", "vision_tower.vision_model"),
            ("model.multi_modal_projector", "multi_modal_projector"),
        ],
    ),
    "qwen2.5-vl of 2025": ("qwen2_5_vl", [("model.visual", "visual"), ("model.language_model", "model")]),
    "experts with the names of the class": ("mixtral", []),
    "experts without the base prefix": ("qwen3_moe", [("model.", "")]),
}


@pytest.mark.parametrize("case", LEGACY)
def test_files_with_other_names_are_understood_as_transformers_does(case: str, tmp_path: Path) -> None:
    family, changes = LEGACY[case]
    model = tiny(family)
    state = model.state_dict()
    disk = saved(model, tmp_path) if "without the base" in case else {**state}
    for alias in Names(model).aliases:
        disk.pop(alias, None)
    for old, new in changes:
        disk = renamed(disk, old, new)
    names = Names(model, shapes(disk))
    assert names.expected() == shapes(disk)
    assert same(names.to_module(disk), state)
    assert same(names.to_stored(state), disk)

    factory: Any = type(model)
    loaded, report = factory.from_pretrained(
        None, config=model.config, state_dict=disk, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert same(loaded.state_dict(), state)


def test_names_that_need_no_conversion_never_reach_transformers_internals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("llama")
    monkeypatch.delattr(core_model_loading, "rename_source_key")
    state = model.state_dict()
    names = Names(model, shapes(state))
    assert names.expected() == shapes(state)
    assert same(names.to_stored(state), state)


@pytest.mark.parametrize("missing", ["rename_source_key", "WeightConverter", "revert_weight_conversion"])
def test_a_transformers_without_an_internal_function_is_refused_by_name(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(core_model_loading, missing)
    with pytest.raises(EnvironmentFailure, match=rf"core_model_loading\.{missing}"):
        Names(tiny("mixtral"))


def test_tied_embeddings_are_expected_once_and_come_back_under_both_names() -> None:
    model = tiny("gemma2")
    names = Names(model)
    embeddings = model.state_dict()["model.embed_tokens.weight"]
    assert names.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in names.expected()
    assert list(names.to_stored({"lm_head.weight": embeddings})) == ["model.embed_tokens.weight"]
    back = names.to_module({"model.embed_tokens.weight": embeddings})
    assert list(back) == ["model.embed_tokens.weight", "lm_head.weight"]
    assert back["lm_head.weight"] is back["model.embed_tokens.weight"]


def test_a_file_that_repeats_tied_embeddings_names_what_must_be_equal() -> None:
    model = tiny("gemma2")
    state = model.state_dict()
    names = Names(model, shapes(state))
    assert names.duplicates == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in names.expected()
    assert same(names.to_stored(state), state)
    assert same(names.to_module(state), state)


def test_a_file_may_hold_tied_embeddings_under_the_name_of_the_head() -> None:
    model = tiny("gemma2")
    state = model.state_dict()
    stored = {name: tensor for name, tensor in state.items() if name != "model.embed_tokens.weight"}
    names = Names(model, shapes(stored))
    assert names.expected() == shapes(stored)
    assert same(names.to_module(stored), state)


def test_missing_tensors_are_expected_under_the_name_that_save_pretrained_gives() -> None:
    model = tiny("mixtral")
    full = Names(model).expected()
    gone = {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        *(
            name
            for name in full
            if name.startswith("model.layers.1.block_sparse_moe.experts.") and ".w2." in name
        ),
    }
    names = Names(model, {name: shape for name, shape in full.items() if name not in gone})
    assert names.expected() == full


def test_one_missing_expert_is_named_as_the_others_are() -> None:
    model = tiny("qwen3_moe")
    found = {name.removeprefix("model."): shape for name, shape in Names(model).expected().items()}
    gone = "layers.1.mlp.experts.2.up_proj.weight"
    expected = Names(model, {name: shape for name, shape in found.items() if name != gone}).expected()
    assert set(expected) - set(found) == {f"model.{gone}"}
    assert set(found) - set(expected) == {gone}


def test_a_wrong_shape_in_the_files_does_not_change_what_is_expected() -> None:
    model = tiny("mixtral")
    full = Names(model).expected()
    assert Names(model, dict.fromkeys(full, (1, 2, 3))).expected() == full


@pytest.mark.parametrize(
    ("family", "name", "ignored"),
    [
        ("gpt2", "h.0.attn.bias", True),
        ("gpt2", "h.0.attn.c_attn.bias", False),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias", True),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("opt", "model.decoder.layers.0.self_attn.rotary_emb.inv_freq", False),
        ("llava", "vision_tower.vision_model.embeddings.position_ids", True),
        ("llama", "model.layers.7.self_attn.q_proj.weight", False),
    ],
)
def test_only_what_the_class_itself_passes_over_is_ignored(family: str, name: str, ignored: bool) -> None:
    model = tiny(family)
    stored = Names(model).expected()
    if family == "gpt2":
        stored = {key.removeprefix("transformer."): shape for key, shape in stored.items()}
    names = Names(model, {**stored, name: (1,)} if name not in stored else stored)
    assert names.ignored(name) is ignored


def test_extra_tensors_belong_to_no_module() -> None:
    model = tiny("mixtral")
    extra = [
        "model.layers.7.self_attn.q_proj.weight",
        "model.layers.7.block_sparse_moe.experts.0.w1.weight",
        "x",
    ]
    names = Names(model, Names(model).expected() | dict.fromkeys(extra, (1,)))
    assert not set(extra) & (names.module_of.keys() | names.expected().keys())
    with pytest.raises(InputError, match="'x' does not belong to this model"):
        names.to_module({"x": torch.zeros(1)})


def test_part_of_a_fused_tensor_is_refused() -> None:
    model = tiny("mixtral")
    names = Names(model)
    stored = names.to_stored(model.state_dict())
    stored.pop("model.layers.1.block_sparse_moe.experts.3.w3.weight")
    with pytest.raises(InputError, match=r"gate_up_proj' is incomplete.*experts\.3\.w3"):
        names.to_module(stored)
    with pytest.raises(InputError, match=r"'lm_head\.bias' is not in this model"):
        names.to_stored({"lm_head.bias": torch.zeros(1)})


def test_loading_reads_each_tensor_once_and_holds_one_fused_parameter_at_a_time() -> None:
    model = tiny("qwen2_moe")
    names = Names(model)
    disk = names.to_stored(model.state_dict())
    reads: list[str] = []

    def read(name: str) -> Tensor:
        reads.append(name)
        return disk[name]

    wanted = ["model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"]
    counts = []
    for name, tensor in names.load(wanted, read):
        assert torch.equal(tensor, model.state_dict()[name])
        counts.append(len(reads))
    assert counts == [4, 12]
    assert len(set(reads)) == 12
