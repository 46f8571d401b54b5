"""Blocks of other sizes than their configuration says: how modules take them on, and what a skipped one does.

Only torch is imported, because this file also travels with a model that plain transformers is to run.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class SizedConfig:
    """A configuration with other numbers of heads; all else is asked of the model's own, while it may change.

    A copy would not do: the attention kernel is chosen on the model's configuration after it was built.
    """

    def __init__(self, config: Any, **sizes: int) -> None:
        vars(self).update(sizes, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # not there yet while a copy is being made
            raise AttributeError(name)
        return getattr(self._config, name)


# Since transformers 5.24, before it and in code of a model folder, and long ago.
CACHE_NAMES = ("cache", "past_key_values", "layer_past")


def cache_of(said: Mapping[str, Any]) -> Any:
    """Return the cache that a model hands to its parts, or that stands in what it says; None without one."""
    return next(iter(cache_entry(said).values()), None)


def cache_entry(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same under its name, as a forward takes it; {} without one."""
    return next(({name: said[name]} for name in CACHE_NAMES if said.get(name) is not None), {})


class SkippedAttention(nn.Module):
    """Stands where an attention was: its output is zero.

    It still tells the cache how many tokens passed. A cache is as long as its first layer, so generation
    would place later tokens wrongly if that layer stayed empty.

    Args:
        layer_idx: The layer's place in the cache.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Map [batch, tokens, hidden] to zeros of that shape."""
        cache = cache_of(kwargs)
        if cache is not None:
            mark = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(mark, mark, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class SkippedMlp(nn.Module):
    """Stands where a feed-forward was: its output is zero."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map [..., hidden] to zeros of that shape."""
        return torch.zeros_like(hidden_states)


def resize_block(block: nn.Module, paths: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Give a block the sizes that a configuration lists for it, whichever values its parameters keep.

    Args:
        block: The block as its family's configuration builds it.
        paths: Where its parts are, as for `fit_sizes`, also "q", "v", "gate" and "gate_up".
        sizes: "heads", "kv_heads", "channels", "experts" and "expert_width" where they are others; 0 heads
            for no attention, 0 channels for no feed-forward; "biases": paths of linears that have got one.
    """
    for path in sizes.get("biases", ()):
        linear: Any = block.get_submodule(path)
        if linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.weight.shape[0]))
    size = _head_size(block.get_submodule(paths["attention"]))
    heads = sizes.get("heads")
    if heads == 0:
        _empty(block, paths["attention"])
    elif heads is not None:
        kv_heads = sizes["kv_heads"]
        rows = {"q": heads, "k": kv_heads, "v": kv_heads, "qkv": heads + 2 * kv_heads}
        for part, count in rows.items():
            _resize(block, paths[part], 0, count * size)
        _resize(block, paths["o"], 1, heads * size)
    channels = sizes.get("channels")
    if channels == 0:
        for path in [paths["mlp"]] if paths["mlp"] else [paths["up"], paths["down"]]:
            _empty(block, path)
    elif channels is not None:
        for part, count in (("gate", channels), ("up", channels), ("gate_up", 2 * channels)):
            _resize(block, paths[part], 0, count)
        _resize(block, paths["down"], 1, channels)
    if "experts" in sizes:
        _resize(block, paths["experts"], 0, sizes["experts"])
        _resize(block, paths["router"], 0, sizes["experts"])
    fit_sizes(block, paths)


def fit_sizes(block: nn.Module, paths: Mapping[str, Any]) -> None:
    """Let the modules of a block follow the shapes of their parameters, some of which were cut or dropped.

    Args:
        block: The block.
        paths: Where its "attention", "k", "qkv", "o", "mlp", "up", "down", "experts" and "router" are; ""
            for what its family lacks.
    """
    for module in block.modules():
        weight = module._parameters.get("weight")
        if weight is not None and isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif weight is not None and hasattr(module, "nf"):  # a Conv1D, which keeps its weight as [in, out]
            vars(module).update(nx=weight.shape[0], nf=weight.shape[1])
    attention: Any = block.get_submodule(paths["attention"])
    if _lost_all(attention):
        block.set_submodule(paths["attention"], SkippedAttention(int(attention.layer_idx)))
    elif not isinstance(attention, SkippedAttention):
        _fit_heads(block, attention, paths)
    if paths["mlp"]:
        if _lost_all(block.get_submodule(paths["mlp"])):
            block.set_submodule(paths["mlp"], SkippedMlp())
    elif _lost_all(block.get_submodule(paths["down"])):  # the linears sit in the block itself
        block.set_submodule(paths["up"], nn.Identity())
        block.set_submodule(paths["down"], SkippedMlp())
    for path in (paths["experts"], paths["router"]):
        here: Any = dict(block.named_modules()).get(path) if path else None
        if here is not None:
            here.num_experts = len(next(here.parameters(recurse=False)))


def _fit_heads(block: nn.Module, attention: Any, paths: Mapping[str, Any]) -> None:
    size = _head_size(attention)
    heads = _outputs_and_inputs(block, paths["o"])[1] // size
    if paths["qkv"]:
        kv_heads = (_outputs_and_inputs(block, paths["qkv"])[0] // size - heads) // 2
    else:
        kv_heads = _outputs_and_inputs(block, paths["k"])[0] // size
    sizes = {
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_key_value_groups": heads // kv_heads,
        "split_size": heads * size,
    }
    for name, value in sizes.items():
        if name in vars(attention):
            setattr(attention, name, value)
    # Phi-3 asks its configuration for the number of heads at every forward.
    config = getattr(attention.config, "_config", attention.config)
    same = config.num_attention_heads == heads
    attention.config = config if same else SizedConfig(config, num_attention_heads=heads)


def _head_size(attention: Any) -> int:
    return int(getattr(attention, "head_dim", None) or attention.head_size)


def _lost_all(module: nn.Module) -> bool:
    """Tell whether a module that had parameters has none any more."""
    return any(part._parameters for part in module.modules()) and next(module.parameters(), None) is None


def _empty(block: nn.Module, path: str) -> None:
    for module in block.get_submodule(path).modules():
        for name in module._parameters:
            module._parameters[name] = None


def _resize(block: nn.Module, path: str, side: int, size: int) -> None:
    """Keep the first outputs (side 0) or inputs (side 1) of what stands at a path; nothing does at ""."""
    modules = dict(block.named_modules())
    if not path or path not in modules:
        return
    turned = hasattr(modules[path], "nf")
    for name, parameter in modules[path].named_parameters(recurse=False):
        if parameter.ndim > 1 or side == 0:
            axis = 1 - side if turned and parameter.ndim == 2 else side
            cut = parameter.data.narrow(axis, 0, size).clone()
            modules[path]._parameters[name] = nn.Parameter(cut, requires_grad=parameter.requires_grad)


def _outputs_and_inputs(block: nn.Module, path: str) -> tuple[int, int]:
    linear: Any = block.get_submodule(path)
    sizes = (linear.nf, linear.nx) if hasattr(linear, "nf") else (linear.out_features, linear.in_features)
    return int(sizes[0]), int(sizes[1])
