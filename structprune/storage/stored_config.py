"""A model's config.json, read strictly: private keys removed, impossible sizes and quantisation refused."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from structprune.errors import InputError
from structprune.storage.header import DTYPE_NAMES, TensorInfo
from structprune.storage.strict_json import read_json

logger = logging.getLogger(__name__)

# Configurations with a per-layer list for everything stay under 1 MB.
MAX_CONFIG_BYTES = 4_000_000

# Written by older transformers versions into every config; without effect, so removed without a warning.
_HARMLESS = frozenset(
    {"_name_or_path", "_commit_hash", "_attn_implementation_autoset", "_flash_attn_2_enabled"}
)

# Their keys are labels of a user, not settings.
_LABELS = frozenset({"id2label", "label2id"})

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads"),
    *("n_embd", "n_layer", "n_head"),  # GPT-2
    *("ffn_dim", "word_embed_proj_dim"),  # OPT
    *("num_experts", "num_local_experts", "moe_intermediate_size", "shared_expert_intermediate_size"),
)
# How many blocks there are: each has a tensor of its own at least.
_DEPTHS = frozenset({"num_hidden_layers", "n_layer", "depth"})

# Last part of a tensor's name -> the scheme that leaves such tensors; only integers and fp8 are looked at.
_SCHEMES = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "weight_packed": "compressed-tensors packed",
    "SCB": "bitsandbytes int8",
    "absmax": "bitsandbytes 4-bit",
    "quant_map": "bitsandbytes 4-bit",
    "blocks": "MXFP4",
    "scales": "MXFP4",
}


def read_config(path: Path, root: Path | None) -> dict[str, Any]:
    """Read config.json and remove from it what no file may decide: private keys and trust_remote_code.

    Raises:
        InputError: Missing, damaged, not an object, a size that is not a positive whole number, or quantised.
    """
    config = read_json(path, limit_bytes=MAX_CONFIG_BYTES, root=root)
    if not isinstance(config, dict):
        raise InputError(
            f"{path}: must hold an object, found {str(config)[:80]!r}",
            hint="put the model's own config.json there: fetch it again",
        )
    _strip(config, path, "")
    for key, part in _parts(config):
        _check_sizes(part, path, key)
        _refuse_quantised(part, path, key)
    return config


def check_sizes(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], path: Path) -> None:
    """Compare the sizes of a configuration with the tensors, before anything of such a size is built.

    Args:
        config: What `read_config` returned.
        tensors: Of the same folder.
        path: The config.json, for errors.

    Raises:
        InputError: A size is larger than any side of any tensor, or there are more blocks than tensors.
    """
    largest = max((size for info in tensors.values() for size in info.shape), default=0)
    for where, part in _parts(config):
        for key in (*_SIZES, *_DEPTHS):
            size = part.get(key)
            most = len(tensors) if key in _DEPTHS else max(largest, len(tensors))
            if type(size) is int and size > most:
                raise InputError(
                    f"{path}: {where}{key} is {size}, the files hold {len(tensors)} tensors whose largest "
                    f"side is {largest}",
                    hint="config.json and weights belong to different models",
                )


def without_ignored(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as it is written again: without the keys that `read_config` says it ignores."""
    return {
        key: without_ignored(value) if isinstance(value, dict) and key not in _LABELS else value
        for key, value in config.items()
        if key in _HARMLESS or not _is_ignored(key)
    }


def has_custom_code(config: Mapping[str, Any]) -> bool:
    """Tell whether the configuration, or one inside it, asks for code that is shipped with the model."""
    return any("auto_map" in part for _, part in _parts(config))


def refuse_quantised_tensors(tensors: Mapping[str, TensorInfo], folder: Path) -> None:
    """Refuse weights that are codes of a quantisation scheme, not the numbers that the model computes with.

    Raises:
        InputError: A tensor in fp8, or an integer tensor under a name that a quantisation scheme uses.
    """
    for info in tensors.values():
        if (info.dtype.is_floating_point and info.dtype.itemsize > 1) or info.dtype.is_complex:
            continue
        last = info.name.rsplit(".", 1)[-1]
        scheme = next(
            (text for ending, text in _SCHEMES.items() if last == ending or last.endswith("_" + ending)), ""
        )
        if info.dtype.is_floating_point:
            scheme = scheme or "fp8"
        elif last == "weight" and len(info.shape) > 1:
            scheme = scheme or ("bitsandbytes 4-bit" if info.name + ".absmax" in tensors else "integer codes")
        if scheme:
            raise InputError(
                f"{folder / info.file}: tensor {info.name!r} is {DTYPE_NAMES[info.dtype]}: "
                f"this checkpoint is quantised ({scheme})",
                hint="use the original model, or dequantise it first",
            )


def _strip(config: dict[str, Any], path: Path, where: str) -> None:
    for key in list(config):
        if _is_ignored(key):
            del config[key]
            if key not in _HARMLESS:
                logger.warning("%s: the private key %r is ignored", path, where + key)
        elif isinstance(config[key], dict) and key not in _LABELS:
            _strip(config[key], path, f"{where}{key}.")


def _is_ignored(key: str) -> bool:
    return key.startswith("_") or key == "trust_remote_code"


def _parts(config: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the configuration and every one inside it (text_config ...), with the key that leads there."""
    yield key, config
    for name, value in config.items():
        if name.endswith("_config") and isinstance(value, dict):
            yield from _parts(value, f"{key}{name}.")


def _check_sizes(config: Mapping[str, Any], path: Path, where: str) -> None:
    for key in _SIZES:
        size = config.get(key)
        # Some families give one size per layer, or none where it follows from others.
        if size is None or isinstance(size, list):
            continue
        if type(size) is not int or not 0 < size < 2**31:
            raise InputError(
                f"{path}: {where}{key} is {_quoted(size)}, expected a whole number of at least 1",
                hint="a model with a part of size zero cannot be pruned",
            )
    padding, rows = config.get("pad_token_id"), config.get("vocab_size")
    if type(padding) is int and type(rows) is int and not -rows <= padding < rows:
        raise InputError(
            f"{path}: {where}pad_token_id is {padding}, expected one of the {rows} tokens of vocab_size",
            hint="put the model's own config.json there: fetch it again",
        )
    for key in ("dtype", "torch_dtype"):
        if not isinstance(config.get(key), str | dict | None):
            raise InputError(
                f"{path}: {where}{key} is {_quoted(config[key])}, expected the name of a dtype",
                hint="put the model's own config.json there: fetch it again",
            )


def _quoted(value: object) -> str:
    """Return a value as JSON writes it, not too long of it."""
    return json.dumps(value, default=str)[:40]


def _refuse_quantised(config: Mapping[str, Any], path: Path, where: str) -> None:
    for key in ("quantization_config", "quantization", "compression_config"):
        if not config.get(key):
            continue
        scheme = config[key]
        names = ("quant_method", "format", "mode", "bits")
        found = (
            [f"{name} {scheme[name]}" for name in names if name in scheme] if isinstance(scheme, dict) else []
        )
        name = ", ".join(found)[:80] or "unnamed scheme"
        raise InputError(
            f"{path}: {where}{key} is present: this checkpoint is quantised ({name})",
            hint="use the original model, or dequantise it first",
        )
