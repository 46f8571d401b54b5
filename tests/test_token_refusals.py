"""What cannot be right with fewer tokens is refused by name; a paused model takes all of it."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    StaticCache,
)

from structprune.errors import InputError, UsageError
from structprune.runtime.attach import engine_of, paused
from structprune.runtime.masks import narrow
from structprune.runtime.refusals import check_runs
from tests.oracle import TOKEN_METHODS, generate, pictures, pruned, token_pruner
from tests.pictures import vision_model
from tests.tiny import CACHE, tiny, tokens

BATCH = pictures("llava").batch()


def _refused(model: PreTrainedModel, match: str, **wanted: Any) -> UsageError:
    """Return what says that a way to generate is refused."""
    with pytest.raises(UsageError, match=match) as caught:
        generate(model, BATCH, **wanted)
    return caught.value


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("prefill_chunk_size", 8, "read in chunks"),
        ("prompt_lookup_num_tokens", 3, "prompt-lookup decoding"),
        ("assistant_early_exit", 1, "assisted decoding"),
        ("cache_implementation", "static", "cache_implementation='static'"),
        ("cache_implementation", "offloaded", "cache_implementation='offloaded'"),
        ("cache_implementation", "quantized", "cache_implementation='quantized'"),
    ],
)
@pytest.mark.parametrize("way", ["argument", "config", "position", "default"])
def test_a_way_to_generate_is_refused_however_it_is_asked_for(
    way: str, name: str, value: Any, match: str
) -> None:
    model = vision_model("llava")
    with pruned(model, token_pruner("fastv"), BATCH):
        match way, GenerationConfig(**{name: value}):
            case "argument", _:
                error = _refused(model, match, **{name: value})
            case "config", config:
                error = _refused(model, match, generation_config=config)
            case "position", config:
                rest = {key: one for key, one in BATCH.items() if key != "input_ids"}
                with pytest.raises(UsageError, match=match) as caught:
                    model.generate(BATCH["input_ids"], config, **rest)
                error = caught.value
            case _, config:
                model.generation_config = config
                error = _refused(model, match)
    assert error.exit_code == 2 and error.hint


def test_assisted_decoding_is_refused() -> None:
    model = vision_model("llava")
    with pruned(model, token_pruner("fastv"), BATCH):
        _refused(model, "assisted decoding", assistant_model=copy.deepcopy(model))


def test_a_paused_model_generates_in_every_way() -> None:
    model = vision_model("llava")
    text = {name: BATCH[name][2:, -8:] for name in ("input_ids", "attention_mask")}
    expected = generate(model, text, prompt_lookup_num_tokens=3).sequences
    with pruned(model, token_pruner("fastv"), BATCH), paused(model):
        assert torch.equal(generate(model, text, prompt_lookup_num_tokens=3).sequences, expected)
        assert (
            generate(model, BATCH, cache_implementation="static", disable_compile=True).sequences.shape[0]
            == 3
        )


def _static(model: PreTrainedModel) -> StaticCache:
    return StaticCache(model.config.get_text_config(), max_cache_len=128)


def _offloaded(model: PreTrainedModel) -> DynamicCache:
    return _offloading(DynamicCache(config=model.config.get_text_config()))


def _grown(model: PreTrainedModel) -> DynamicCache:
    return _offloading(DynamicCache())


def _offloading(cache: DynamicCache) -> DynamicCache:
    """Mark a cache as what its constructor makes where there is a card, or a build of torch without any."""
    assert cache.offloading is False
    cache.offloading = True
    return cache


def _quantised(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config.get_text_config())
    kinds = {kind.__name__: kind for kind in _below(type(cache.layers[0]))}
    # As its layers are, without the packages that quantise.
    cache.layers = [object.__new__(kinds["QuantoQuantizedLayer"]) for _ in cache.layers]
    for layer in cache.layers:
        layer.keys = layer.values = None
        layer.is_initialized, layer.cumulative_length = False, 0
    return cache


def _below(kind: type) -> list[type]:
    return [kind, *(one for child in kind.__subclasses__() for one in _below(child))]


@pytest.mark.parametrize("make", [_static, _offloaded, _grown, _quantised])
@pytest.mark.parametrize("method", ["divprune", "fastv", "fitprune"])
def test_a_cache_that_cannot_lose_tokens_is_refused(method: str, make: Any) -> None:
    model = vision_model("llava")
    with pruned(model, token_pruner(method), BATCH), torch.no_grad():
        expected = model(**BATCH).logits
        with pytest.raises(UsageError, match="cannot lose tokens"):
            model(**BATCH, **{CACHE: make(model)})
        assert torch.equal(model(**BATCH).logits, expected)


def test_blocks_whose_cache_goes_by_an_unknown_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden_states: Any, kv_store: Any = None) -> None: ...

    model = vision_model("llava")
    monkeypatch.setattr(type(model.base_model.language_model.layers[0]), "forward", forward)
    with pytest.raises(UsageError, match="takes no cache under any name that is known"):
        check_runs(model)


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_windows_that_slide_are_refused_whether_there_is_a_cache_or_not(method: str) -> None:
    config = vision_model("llava").config.to_dict()
    config["text_config"] |= {"model_type": "mistral", "sliding_window": 8}
    model = LlavaForConditionalGeneration(type(vision_model("llava").config)(**config)).eval()
    assert model.config.text_config.model_type == "mistral"
    for wanted in (True, False):
        model.config.text_config.use_cache = wanted
        with pytest.raises(UsageError, match="DynamicSlidingWindowLayer"):
            token_pruner(method).calibrate(model, [BATCH])
    assert engine_of(model) is None


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_a_model_that_reads_no_images_is_refused(method: str) -> None:
    model = tiny("llama")
    with pytest.raises(UsageError, match="llama reads no images"):
        token_pruner(method).forecast(model)
    with pytest.raises(UsageError, match="llama reads no images"):
        token_pruner(method).calibrate(model, [tokens(model)])


def test_embeddings_without_ids_are_refused_but_for_one_token() -> None:
    model = vision_model("llava")
    embeddings = torch.randn(1, 6, 64)
    with torch.no_grad():
        dense = model(inputs_embeds=embeddings).logits
        with pruned(model, token_pruner("fastv"), BATCH):
            with pytest.raises(UsageError, match="inputs_embeds without input_ids"):
                model(inputs_embeds=embeddings)
            with paused(model):
                assert torch.equal(model(inputs_embeds=embeddings).logits, dense)
            cache = model(**BATCH, use_cache=True).past_key_values
            ids = torch.full((3, 1), 5)
            mask = torch.cat([BATCH["attention_mask"], torch.ones_like(ids)], 1)
            after = model(input_ids=ids, attention_mask=mask, **{CACHE: copy.deepcopy(cache)}).logits
            same = model(
                inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, **{CACHE: cache}
            ).logits
    assert torch.equal(after, same)


def test_a_mask_that_is_made_already_is_refused() -> None:
    model = vision_model("llava")
    length = BATCH["input_ids"].shape[1]
    mask = torch.ones(3, 1, length, length, dtype=torch.bool).tril()
    with pruned(model, token_pruner("fastv"), BATCH), torch.no_grad():
        for wrong in (mask, {"full_attention": mask}):
            with pytest.raises(UsageError, match=r"not \[batch, tokens\]"):
                model(**BATCH | {"attention_mask": wrong})


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_blocks_that_are_computed_twice_are_refused() -> None:
    model = vision_model("llava").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    text = {name: BATCH[name][2:] for name in ("input_ids", "attention_mask")}
    labels = BATCH["input_ids"]
    with pruned(model.eval(), token_pruner("fastv"), BATCH):
        model(**BATCH, labels=labels)
        model.train()
        with pytest.raises(UsageError, match="gradient checkpointing"):
            model(**BATCH, labels=labels)
        model(**text, labels=text["input_ids"]).loss.backward()
        with paused(model):
            model(**BATCH, labels=labels).loss.backward()


def test_a_plan_of_another_model_is_refused() -> None:
    model = vision_model("llava")
    plan = token_pruner("fastv").calibrate(model, [BATCH])
    other = vision_model("qwen3_vl")
    with pytest.raises(InputError, match="'fastv' is for another architecture than this qwen3_vl"):
        token_pruner("fastv").apply(other, plan)
    assert engine_of(other) is None


def test_a_fit_without_images_is_refused() -> None:
    model = vision_model("llava")
    text = {name: BATCH[name][2:] for name in ("input_ids", "attention_mask")}
    with pytest.raises(InputError, match="no images"):
        token_pruner("fitprune").calibrate(model, [text])
    assert engine_of(model) is None


def test_a_kernel_whose_mask_cannot_be_narrowed_is_refused() -> None:
    rows = torch.tensor([[0, 2]])
    with pytest.raises(UsageError, match="mask of kind str cannot lose tokens"):
        narrow("as flexible kernels have", rows, rows, rows >= 0, past=0, even=True)
