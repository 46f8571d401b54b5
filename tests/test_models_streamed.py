"""Opening models: whole or streamed, what is there is what transformers would have loaded, bit for bit."""

import json
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from structprune.errors import InputError, UsageError
from structprune.models.arch import blocks
from structprune.models.opening import Opening
from structprune.models.streamed import StreamedModel, open_model
from tests.tiny import FAMILIES, save_tiny, tiny, tokens

VLMS = ("llava", "qwen2_5_vl")
WEIGHTS = "model.safetensors"


def reference(family: str, folder: Path) -> PreTrainedModel:
    factory: Any = AutoModelForImageTextToText if family in VLMS else AutoModelForCausalLM
    model: PreTrainedModel = factory.from_pretrained(folder)
    return model


def resident(folder: Path, **options: Any) -> PreTrainedModel:
    model = open_model(folder, Opening(**options))
    assert isinstance(model, PreTrainedModel)
    return model


def streamed(folder: Path, **options: Any) -> StreamedModel:
    model = open_model(folder, Opening(stream=True, **options))
    assert isinstance(model, StreamedModel)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    result: Tensor = model(**tokens(model)).logits
    return result


def differences(one: nn.Module, other: nn.Module) -> list[str]:
    """Name every parameter and buffer, stored or not, that differs in existence, dtype, device or a bit."""
    left = dict(one.named_parameters(remove_duplicate=False)) | dict(one.named_buffers())
    right = dict(other.named_parameters(remove_duplicate=False)) | dict(other.named_buffers())
    return sorted(left.keys() ^ right.keys()) + [
        name
        for name in left.keys() & right.keys()
        if left[name].dtype != right[name].dtype or not torch.equal(left[name], right[name])
    ]


def on_meta(model: StreamedModel) -> set[str]:
    state = model.skeleton.state_dict(keep_vars=True)
    return {name for name, tensor in state.items() if tensor.is_meta}


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def own_llama(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "llama"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_resident_and_streamed_models_equal_from_pretrained(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = save_tiny(family, tmp_path, shards=3, dtype=dtype)
    expected = reference(family, folder)
    model = resident(folder)
    assert type(model) is type(expected)
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not differences(model, expected)
    assert torch.equal(logits(model), logits(expected))
    assert model.config.to_dict() == expected.config.to_dict()

    stream = streamed(folder)
    assert on_meta(stream) == set(stream.skeleton.state_dict())
    stream.fill("")
    assert not differences(stream.skeleton, expected)
    assert not any(parameter.requires_grad for parameter in stream.skeleton.parameters())
    assert torch.equal(logits(stream.skeleton), logits(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_resident_block_equals_the_same_block_of_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path)
    stream, expected = streamed(folder), reference(family, folder)
    everything = set(stream.skeleton.state_dict())
    for prefix, block in blocks(expected):
        with stream.resident(prefix) as module:
            assert module is stream.skeleton.get_submodule(prefix)
            assert not differences(module, block)
            assert on_meta(stream) == {name for name in everything if not name.startswith(f"{prefix}.")}
        assert on_meta(stream) == everything


@pytest.mark.parametrize("family", ["llama", "gemma2", "llava"])
def test_body_blocks_and_rest_are_the_whole_model(family: str, tmp_path: Path) -> None:
    stream = streamed(save_tiny(family, tmp_path))
    everything = set(stream.skeleton.state_dict())
    inside = {name for name in everything if name.startswith(tuple(f"{prefix}." for prefix in stream.blocks))}
    with stream.outside(head=False):
        assert on_meta(stream) == inside | {"lm_head.weight"}
    with stream.outside():
        assert on_meta(stream) == inside
    with stream.outside(embeddings=False):
        (embeddings,) = on_meta(stream) - inside
        assert stream.skeleton.get_parameter(embeddings) is stream.skeleton.get_input_embeddings().weight
    assert on_meta(stream) == everything


def test_dropping_a_block_releases_its_parameters(llama: Path) -> None:
    stream = streamed(llama)
    prefix = stream.blocks[0]
    stream.fill(prefix)
    alive = [weakref.ref(parameter) for parameter in stream.skeleton.get_submodule(prefix).parameters()]
    stream.drop(prefix)
    assert not any(reference() is not None for reference in alive)


def test_a_block_that_was_there_before_stays_and_is_not_read_again(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = streamed(llama)
    stream.fill("")
    monkeypatch.setattr(stream.reader, "read", lambda name: pytest.fail(f"read {name} again"))
    with stream.resident(stream.blocks[0]), stream.outside():
        pass
    assert not on_meta(stream)


def test_a_read_that_fails_leaves_nothing_behind(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = streamed(llama)
    real: Callable[[str], Tensor] = stream.reader.read

    def read(name: str) -> Tensor:
        if "down_proj" in name:
            raise OSError("the disk is gone")
        return real(name)

    monkeypatch.setattr(stream.reader, "read", read)
    with pytest.raises(OSError, match="the disk is gone"), stream.resident(stream.blocks[0]):
        pytest.fail("must not be reached")
    assert on_meta(stream) == set(stream.skeleton.state_dict())


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "opt"])
def test_tied_embeddings_are_one_parameter_however_they_are_filled(family: str, tmp_path: Path) -> None:
    stream = streamed(save_tiny(family, tmp_path))
    head, embeddings = "lm_head", stream.names.aliases["lm_head.weight"].removesuffix(".weight")

    def weight(path: str) -> Tensor:
        return stream.skeleton.get_parameter(f"{path}.weight")

    with stream.outside():
        assert weight(head) is weight(embeddings)
        stream.drop(embeddings)
        assert weight(embeddings).is_meta
        assert not weight(head).is_meta
        stream.fill(embeddings)
        assert weight(head) is weight(embeddings)
    assert weight(head) is weight(embeddings)
    stream.fill(head)
    assert not weight(head).is_meta
    assert weight(embeddings).is_meta
    assert resident(tmp_path).get_parameter("lm_head.weight").is_leaf


def test_a_tied_head_that_is_stored_twice_is_accepted_when_equal_and_refused_when_not(tmp_path: Path) -> None:
    folder = save_tiny("gemma2", tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    model = resident(folder)
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=r"ties 'lm_head\.weight'"):
        open_model(folder)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_an_explicit_dtype_converts_and_auto_keeps_the_dtype_of_the_files(name: str, tmp_path: Path) -> None:
    folder = save_tiny("mixtral", tmp_path, dtype=torch.float16)
    dtype: torch.dtype = getattr(torch, name)
    kept = load_file(folder / WEIGHTS)["model.norm.weight"]
    model = resident(folder, dtype=name)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model.get_parameter("model.norm.weight"), kept.to(dtype))
    assert resident(folder).dtype == torch.float16
    with pytest.raises(UsageError, match="'int8' is not known"):
        Opening(dtype="int8")


def test_what_transformers_keeps_in_float32_stays_in_float32(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = streamed(llama, dtype="bfloat16")
    monkeypatch.setattr(stream.skeleton, "_keep_in_fp32_modules_strict", {"input_layernorm"})
    stream.fill("")
    kept = [name for name, one in stream.skeleton.named_parameters() if one.dtype == torch.float32]
    assert kept == [f"{prefix}.input_layernorm.weight" for prefix in stream.blocks]


def test_auto_follows_the_files_and_not_the_config(own_llama: Path) -> None:
    edit_json(own_llama / "config.json", dtype="bfloat16")
    assert resident(own_llama).dtype == torch.float32


def test_mixed_dtypes_are_computed_in_the_commonest_with_a_warning(
    own_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(own_llama / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, own_llama / WEIGHTS, {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        model = resident(own_llama)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert "computing in torch.float32" in caplog.text


def test_the_generation_config_is_loaded_and_the_model_generates(own_llama: Path) -> None:
    edit_json(own_llama / "generation_config.json", max_new_tokens=3, do_sample=False)
    model, expected = resident(own_llama), reference("llama", own_llama)
    assert model.generation_config is not None
    assert model.generation_config.max_new_tokens == 3
    writers: list[Any] = [model, expected]
    written = [one.generate(**tokens(one, length=5)) for one in writers]
    assert written[0].shape == (2, 8)
    assert written[0].equal(written[1])


def test_damaged_generation_configs_are_refused(own_llama: Path) -> None:
    (own_llama / "generation_config.json").write_text('{"do_sample": true,')
    with pytest.raises(InputError, match=r"generation_config\.json"):
        open_model(own_llama)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unheard_of"}, "'unheard_of' is not known"),
        ({"hidden_act": "unheard_of"}, r"config\.json: .*unheard_of"),
        ({"hidden_size": "many"}, r"config\.json"),
        ({"num_hidden_layers": 3}, r"3 blocks .* hold 2"),
        ({"num_hidden_layers": 1}, r"1 block .* hold 2"),
        ({"intermediate_size": 64}, "another shape"),
        ({"tie_word_embeddings": True}, r"ties 'lm_head\.weight'"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_config_that_is_not_that_of_the_weights_is_refused(
    own_llama: Path, changes: dict[str, Any], message: str, stream: bool
) -> None:
    edit_json(own_llama / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        open_model(own_llama, Opening(stream=stream))


def test_a_model_that_is_no_causal_language_model_is_refused(own_llama: Path) -> None:
    edit_json(own_llama / "config.json", model_type="siglip_vision_model")
    with pytest.raises(InputError, match="no causal language model"):
        open_model(own_llama)


CODE = """
from transformers import LlamaForCausalLM
from pathlib import Path
Path(r"{marker}").touch()
class Custom(LlamaForCausalLM):
    pass
"""


def test_code_of_the_folder_runs_only_when_it_is_trusted(
    own_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "executed"
    (own_llama / "modeling_custom.py").write_text(CODE.format(marker=marker))
    edit_json(own_llama / "config.json", auto_map={"AutoModelForCausalLM": "modeling_custom.Custom"})
    with pytest.raises(InputError, match="--trust-remote-code"):
        open_model(own_llama)
    assert not marker.exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = resident(own_llama, trust_remote_code=True)
    assert marker.exists()
    assert type(model).__name__ == "Custom"
    assert torch.equal(logits(model), logits(tiny("llama")))
