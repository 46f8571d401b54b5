"""Tiny checkpoints written by hand, so that each test can damage one place."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from structprune.models import agreement
from structprune.storage.reader import CheckpointReader, refusal_of_code
from structprune.storage.stored_config import has_custom_code

HIDDEN, INNER, WORDS, BLOCKS = 8, 12, 16, 2


def config(**changes: object) -> dict[str, object]:
    """A Llama configuration that fits `tensors()`; a change to None removes the key."""
    content: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": WORDS,
        "tie_word_embeddings": False,
    }
    return {key: value for key, value in (content | changes).items() if value is not None}


def shapes(blocks: int = BLOCKS) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a Llama of this size needs."""
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        for name in "qkvo":
            result[f"{prefix}self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            result[f"{prefix}mlp.{name}_proj.weight"] = (INNER, HIDDEN)
        result[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INNER)
        result[f"{prefix}input_layernorm.weight"] = (HIDDEN,)
        result[f"{prefix}post_attention_layernorm.weight"] = (HIDDEN,)
    result["model.norm.weight"] = (HIDDEN,)
    result["lm_head.weight"] = (WORDS, HIDDEN)
    return result


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of `shapes()`."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes().items()}


def write(
    folder: Path, content: dict[str, Tensor] | None = None, *, shards: int = 1, settings: object = None
) -> Path:
    """Write a model folder: one file, or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    content = tensors() if content is None else content
    (folder / "config.json").write_text(json.dumps(config() if settings is None else settings))
    if shards == 1:
        save_file(content, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    names = list(content)
    for shard in range(shards):
        file = shard_name(shard, shards)
        part = {name: content[name] for name in names[shard::shards]}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, folder / file, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in content.values())
    write_index(folder, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return folder


def shard_name(shard: int, shards: int) -> str:
    return f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"


def write_index(folder: Path, content: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def change_index(folder: Path, **weight_map: str | None) -> None:
    """Point tensors at other files in the index; None removes one."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    changed = {**index["weight_map"], **weight_map}
    index["weight_map"] = {name: file for name, file in changed.items() if file is not None}
    path.write_text(json.dumps(index))


def change_header(path: Path, change: object) -> None:
    """Rewrite a file's header: `change` alters the parsed header, or is the bytes of the new one."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if callable(change):
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
    else:
        assert isinstance(change, bytes)
        text = change
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def header_of(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[8 : 8 + int.from_bytes(raw[:8], "little")]


def open_strictly(folder: Path) -> dict[str, Tensor]:
    """Do all that happens to an input before any work, then read every tensor."""
    reader = CheckpointReader(folder)
    if has_custom_code(reader.config):
        raise refusal_of_code(folder)
    agreement.check(reader, shapes(), lambda name: name.endswith("rotary_emb.inv_freq"))
    reader.scan()
    return {name: reader.read(name) for name in reader.tensors}


def fingerprint(folder: Path) -> dict[str, str]:
    """What stands in a folder: name -> hash of a file, or its kind."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else str(path.lstat().st_mode)
        for path in sorted(folder.rglob("*"))
    }
