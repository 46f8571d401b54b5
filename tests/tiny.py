"""Tiny random models of every supported family, built from configs in memory, and a tokenizer for them.

Two blocks, hidden size 64, every width a multiple of 8; grouped-query attention, sliding windows and tied
embeddings wherever the family has them. Nothing is downloaded.
"""

import copy
import inspect
import math
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from structprune.models.shapes import CACHE_NAMES

# What a model calls its cache: another name since transformers 5.24.
CACHE = next(name for name in CACHE_NAMES if name in inspect.signature(LlamaModel.forward).parameters)
VOCABULARY = 320  # the tokenizer uses the first 300 ids; the last ones are the image tokens of the VLMs
TEXT_IDS = range(3, 300)
LENGTH = 128
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = SPECIAL | {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2, "intermediate_size": 96}
EXPERTS: dict[str, Any] = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
LAYER_TYPES = ["sliding_attention", "full_attention"]

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=16),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=24),
    "gemma2": lambda: Gemma2Config(**GROUPED, head_dim=24, sliding_window=16, layer_types=LAYER_TYPES),
    "gemma3": lambda: Gemma3TextConfig(**GROUPED, head_dim=24, sliding_window=16, layer_types=LAYER_TYPES),
    "phi3": lambda: Phi3Config(**GROUPED),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64),
    "gpt2": lambda: GPT2Config(
        **SPECIAL, vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, n_inner=96
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=96),
    "mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=48),
    "qwen3_moe": lambda: Qwen3MoeConfig(**EXPERTS | {"head_dim": 24}),
    "llava": lambda: LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, num_hidden_layers=3, projection_dim=32),
        text_config=LlamaConfig(**GROUPED),
        image_token_index=VOCABULARY - 1,
        tie_word_embeddings=False,
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        text_config=GROUPED
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 8,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=VOCABULARY - 1,
        video_token_id=VOCABULARY - 2,
        vision_start_token_id=VOCABULARY - 3,
        vision_end_token_id=VOCABULARY - 4,
        tie_word_embeddings=False,
    ),
}
FAMILIES: list[str] = list(CONFIGS)


def tiny(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, depth: int = 2
) -> PreTrainedModel:
    """Build a tiny model of a family with `depth` blocks in eval mode, with weights drawn from `seed`.

    Raises:
        KeyError: `family` is not one of `FAMILIES`.
    """
    # A copy is made in a third of the time.
    return copy.deepcopy(_drawn(family, seed, dtype, depth))


@cache
def _drawn(family: str, seed: int, dtype: torch.dtype, depth: int) -> PreTrainedModel:
    config = deepened(CONFIGS[family](), depth)
    text_only = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING if text_only else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    model: PreTrainedModel = mapping[type(config)](config)
    config.dtype = dtype
    randomise(model, seed)
    module: nn.Module = model
    module.to(dtype).eval()
    return model


def deepened(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """Give a configuration `depth` blocks, whose kinds of attention repeat those it lists."""
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if types := getattr(text, "layer_types", None):
        text.layer_types = [types[index % len(types)] for index in range(depth)]
    return config


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Redraw every parameter: matrices with a standard deviation of 0.1, norms around their neutral value."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.1
        # A norm scale starts at 1, or at 0 in Gemma, which adds the 1 itself; all else is drawn around 0.
        neutral = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
        parameter.copy_(noise + neutral)


def save_tiny(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    depth: int = 2,
) -> Path:
    """Save a tiny model and the tokenizer as transformers does, in at least `shards` weight files.

    Returns:
        `folder`, which is created when missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _files(family, seed, shards, dtype, depth).items():
        (folder / name).write_bytes(content)
    return folder


@cache
def _files(family: str, seed: int, shards: int, dtype: torch.dtype, depth: int) -> dict[str, bytes]:
    model = tiny(family, seed=seed, dtype=dtype, depth=depth)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=math.ceil(size / shards) if shards > 1 else "5GB")
        tokenizer().save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    assert shards == 1 or sum(name.startswith("model-") for name in files) >= shards
    return files


def tokens(model: PreTrainedModel, batch: int = 2, length: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Draw text token ids; image tokens never appear.

    Returns:
        `input_ids`, shape [batch, length], on the model's device.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (batch, length), generator=generator)
    return {"input_ids": ids.to(model.device)}


def tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer of 300 entries (3 special, 256 bytes, 41 pairs) for any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # "Ġ" is the byte-level alphabet's sign for a space.
    pairs = [("Ġ", letter) for letter in "tasowbdfhimnpcrlgey"]
    pairs += [(pair[0], pair[1]) for pair in re.findall("..", "heinreeronanatenndtiesorteedisitalarsttontng")]
    entries = ["<pad>", "<s>", "</s>", *alphabet, *(left + right for left, right in pairs)]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    assert len(vocabulary) == TEXT_IDS.stop
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers has no annotation there
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=LENGTH,
    )
