"""Random models and texts for the benches: sizes matter here, quality does not."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 8192


def random_llama(
    folder: Path,
    *,
    blocks: int,
    hidden: int,
    ffn: int,
    dtype: torch.dtype = torch.float32,
    vocabulary: int = VOCABULARY,
    shard_size: str = "50GB",
) -> Path:
    """Save a Llama with random weights and a byte-level tokenizer; returns the folder."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        dtype=dtype,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    entries = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={entry: index for index, entry in enumerate(entries)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    return folder


def token_file(path: Path, *, tokens: int) -> Path:
    """Write a text of random letters, one token each for the tokenizer above; returns the path."""
    draw = random.Random(0)
    lines = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=99)) for _ in range(tokens // 100 + 1)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
