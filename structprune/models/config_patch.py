"""Changes of single keys of a configuration, as a file's content or as a live object."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig


def merge_patch(config: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with some keys changed; a group of keys is merged key by key."""
    merged = dict(config)
    for key, value in patch.items():
        group = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge_patch(merged[key], value) if group else value
    return merged


def patch_config(config: PreTrainedConfig, patch: Mapping[str, Any]) -> None:
    """Change keys of a live configuration, those of the ones inside it too."""
    for key, value in patch.items():
        inner = getattr(config, key, None)
        if isinstance(inner, PreTrainedConfig) and isinstance(value, dict):
            patch_config(inner, value)
        else:
            both = isinstance(inner, dict) and isinstance(value, dict)
            setattr(config, key, merge_patch(inner or {}, value) if both else value)
