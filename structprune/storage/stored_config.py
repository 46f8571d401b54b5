"""A model's config.json, read strictly: private keys removed, impossible sizes and quantisation refused."""

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
)

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
                f"{path}: {where}{key} is {str(size)[:40]}, expected a whole number of at least 1",
                hint="a model with a part of size zero cannot be pruned",
            )


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
