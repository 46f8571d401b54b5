"""How a family's own configuration says the sizes of its blocks, and where it cannot.

A model whose blocks all have the same sizes opens as one of its family, with other numbers in config.json,
unless the family ties them together. Everything else is listed block by block under "pruned_blocks", which
only a modelling file that travels with the model understands.

What was tried: transformers 5.23, every family of the table.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, __version__

from structprune.errors import InputError, UsageError
from structprune.models import shapes
from structprune.models.arch import arch_of, blocks, row_of
from structprune.models.groups import BlockSizes, block_sizes

CONFIG_KEY = "pruned_blocks"

# Families whose configuration takes any number of heads once it names the size of a head. Others take one
# that divides the hidden size, and some derive the size of a head from it and cannot be told.
_FREE_HEADS = frozenset({"mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"})
_DIVIDING_HEADS = frozenset({"llama", "gemma2", "gemma3_text"})
# A Llama without biases computes what a Mistral without a window does, which takes any number of heads. The
# version matters to transformers, which takes tokenizers of a Mistral written by an old one for damaged.
_MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "sliding_window": None,
    "transformers_version": __version__,
}
# What the width of the feed-forward is called, where it is not "intermediate_size".
_WIDTH = {"opt": "ffn_dim", "gpt2": "n_inner"}
_SIZES = ("heads", "kv_heads", "channels", "experts")
_HINT = "the file was changed, or is of a later structprune: create the folder again"
_DEPTH = {"gpt2": "n_layer"}
_EXPERTS = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts", "qwen3_moe": "num_local_experts"}

# The keys that give linears a bias, and which ones: all of them or none, unlike what a repair needs.
_BIASES: Mapping[str, Sequence[str]] = {
    "attention_bias": ("q", "k", "v", "o"),
    "mlp_bias": ("gate", "up", "down"),
}
_BIASED = {
    "llama": ("attention_bias", "mlp_bias"),
    **dict.fromkeys(("gemma2", "gemma3_text", "qwen3", "qwen3_moe"), ("attention_bias",)),
}


def sizes_patch(
    config: PreTrainedConfig,
    found: Sequence[BlockSizes],
    biases: Sequence[Sequence[str]] = (),
    *,
    listed: bool = False,
) -> dict[str, Any]:
    """Return what config.json must say of blocks with these sizes, which differ from what it says now.

    Args:
        config: The model's, as it is.
        found: The blocks' sizes as they are to be.
        biases: Per block the linears, by their path in it, that have got a bias.
        listed: Whether they are listed in any case, because they will be unequal once data decided.
    """
    text = config.get_text_config()
    before = getattr(config, CONFIG_KEY, None) or [{}] * len(found)
    got = [
        sorted({*old.get("biases", ()), *new})
        for old, new in zip(before, biases or [()] * len(found), strict=True)
    ]
    keys = _bias_keys(config, got)
    said = None if listed or keys is None else _native(text, found, keys)
    if said is None:
        return {CONFIG_KEY: [entry_of(*pair) for pair in zip(found, got, strict=True)]}
    changed = {
        key: value for key, value in said.items() if not hasattr(text, key) or getattr(text, key) != value
    }
    unlisted = {CONFIG_KEY: None} if getattr(config, CONFIG_KEY, None) else {}
    return unlisted | (_for_text(config, changed) if changed else {})


def beside_biases(config: PreTrainedConfig, paths: Collection[str]) -> list[str] | None:
    """Return which linears of a block have a bias where the family's configuration gives some one.

    Args:
        config: The model's.
        paths: Linears that are to have one, by their path in a block.

    Returns:
        These, and those that it can only give one together with them; None where it cannot give it to all.
    """
    each = [one for one in _biased_paths(config).values() if not {*one}.isdisjoint(paths)]
    found = [path for one in each for path in one]
    return found if {*paths} <= {*found} else None


def _biased_paths(config: PreTrainedConfig) -> dict[str, list[str]]:
    """Return the keys of a family that give linears a bias, and the paths of those in a block."""
    arch = row_of(config)
    keys = _BIASED.get(config.get_text_config().model_type, ())
    return {key: [getattr(arch, part) for part in _BIASES[key]] for key in keys}


def _bias_keys(config: PreTrainedConfig, got: Sequence[Sequence[str]]) -> dict[str, Any] | None:
    """Return the family's own keys for biases that blocks have got; None where it has none for just these."""
    if not any(got):
        return {}
    paths = {*got[0]}
    if any({*one} != paths for one in got) or {*(beside_biases(config, paths) or ())} != paths:
        return None
    return {key: True for key, one in _biased_paths(config).items() if {*one} <= paths}


def depth_patch(config: PreTrainedConfig, kept: Sequence[int], found: Sequence[BlockSizes]) -> dict[str, Any]:
    """Return what config.json must say of a model that keeps some of its blocks only.

    What a family derives from a block's number is written out, because the numbers change.

    Args:
        config: The model's, as it is.
        kept: Indices of the blocks that stay, ascending.
        found: Sizes of all blocks.

    Raises:
        UsageError: The family scales a block's attention by its number.
    """
    text = config.get_text_config()
    if getattr(text, "scale_attn_by_inverse_layer_idx", False):
        raise UsageError(
            "config.json: scale_attn_by_inverse_layer_idx is true, so a block would change with its number",
            hint="remove heads or channels instead of blocks",
        )
    said: dict[str, Any] = {_DEPTH.get(text.model_type, "num_hidden_layers"): len(kept)}
    if types := getattr(text, "layer_types", None):
        said["layer_types"] = [types[index] for index in kept]
    if hasattr(text, "mlp_only_layers"):
        said["mlp_only_layers"] = [new for new, old in enumerate(kept) if not found[old].experts]
        said["decoder_sparse_step"] = 1
    if listed := getattr(config, CONFIG_KEY, None):
        return {CONFIG_KEY: [listed[index] for index in kept], **_for_text(config, said)}
    return _for_text(config, said)


def _for_text(config: PreTrainedConfig, said: dict[str, Any]) -> dict[str, Any]:
    return said if config.get_text_config() is config else {"text_config": said}


def entry_of(sizes: BlockSizes, biases: Sequence[str] = ()) -> dict[str, Any]:
    """Return how "pruned_blocks" tells the sizes of one block."""
    entry: dict[str, Any] = {"heads": sizes.heads, "kv_heads": sizes.kv_heads}
    entry |= {"experts": sizes.experts} if sizes.experts else {"channels": sizes.channels}
    return entry | ({"biases": list(biases)} if biases else {})


def _native(
    text: PreTrainedConfig, found: Sequence[BlockSizes], biases: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the family's own keys for these sizes beside those for new biases; None where it has none."""
    if not all(sizes.attention and sizes.mlp for sizes in found):
        return None
    kind = text.model_type
    heads = {(sizes.heads, sizes.kv_heads, sizes.head_dim) for sizes in found}
    widths = {sizes.channels for sizes in found if sizes.channels}
    experts = {sizes.experts for sizes in found if sizes.experts}
    if len(heads) > 1 or len(widths) > 1 or len(experts) > 1:
        return None
    ((count, groups, size),) = heads
    said: dict[str, Any] = {**biases}
    if (count, groups) != _heads_of(text):
        divides = kind in _DIVIDING_HEADS and int(text.hidden_size) % count == 0
        if not divides and not biases and _is_plain_llama(text):
            said |= _MISTRAL
        elif not divides and kind not in _FREE_HEADS:
            return None
        said |= {"num_attention_heads": count, "num_key_value_heads": groups, "head_dim": size}
    if widths:
        said[_WIDTH.get(kind, "intermediate_size")] = widths.pop()
    if experts:
        said[_EXPERTS[kind]] = experts.pop()
    return said


def _is_plain_llama(text: PreTrainedConfig) -> bool:
    """Tell whether a configuration is of a Llama for text alone that has no biases."""
    biases = getattr(text, "attention_bias", False) or getattr(text, "mlp_bias", False)
    return text.model_type == "llama" and text.architectures == ["LlamaForCausalLM"] and not biases


def _heads_of(text: PreTrainedConfig) -> tuple[int, int]:
    heads = int(text.num_attention_heads)
    return heads, int(getattr(text, "num_key_value_heads", None) or heads)


def build(model: PreTrainedModel, config: Mapping[str, Any], where: str) -> None:
    """Give the blocks of a skeleton the sizes that its configuration lists.

    Args:
        model: Parameters on the meta device.
        config: Content of config.json.
        where: The file, for errors.

    Raises:
        InputError: What is listed fits no block of the model.
    """
    listed = config.get(CONFIG_KEY)
    if listed is None:
        return
    arch = arch_of(model)
    found = blocks(model, arch)
    expected = f"one object for each of the {len(found)} blocks"
    if not isinstance(listed, list) or len(listed) != len(found) or arch.fallback:
        raise InputError(f"{where}: {CONFIG_KEY} is {str(listed)[:60]}, expected {expected}", hint=_HINT)
    for (prefix, block), entry in zip(found, listed, strict=True):
        try:
            shapes.resize_block(block, arch.paths(), _checked(entry, block_sizes(block, arch)))
        except (AttributeError, RuntimeError, TypeError, ValueError, KeyError) as error:
            raise InputError(
                f"{where}: {CONFIG_KEY} of {prefix} is {str(entry)[:80]}: {error}", hint=_HINT
            ) from None


def _checked(entry: Any, dense: BlockSizes) -> dict[str, Any]:
    """Return an entry whose sizes are at most those of the dense block.

    Raises:
        ValueError: It holds something else.
    """
    if not isinstance(entry, dict):
        raise ValueError("expected an object")
    for key, value in entry.items():
        if key == "biases":
            if not isinstance(value, list) or not all(isinstance(path, str) for path in value):
                raise ValueError("biases must be a list of paths")
            continue
        most = getattr(dense, key, None) if key in _SIZES else None
        if most is None or type(value) is not int or not 0 <= value <= most:
            raise ValueError(f"{key} is {value!r}, expected 0 to {most}")
    heads, groups = entry.get("heads", 0), entry.get("kv_heads", 0)
    if (heads == 0) != (groups == 0) or (groups and heads % groups):
        raise ValueError(f"{heads} query heads do not divide among {groups} key-value heads")
    return entry
