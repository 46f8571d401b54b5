"""What cannot be right with fewer tokens, refused by name before anything runs."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from structprune.errors import UsageError
from structprune.models.arch import arch_of, blocks
from structprune.models.shapes import CACHE_NAMES
from structprune.runtime.images import placeholder
from structprune.runtime.tower_seen import layer_number, tower_attentions

# Ways to generate that show a model its prompt in pieces, or with tokens that may be taken back.
REFUSED = {
    "prefill_chunk_size": "a prompt read in chunks: no chunk sees the whole image",
    "prompt_lookup_num_tokens": "prompt-lookup decoding: guessed tokens would choose with the prompt's",
    "assistant_model": "assisted decoding: guessed tokens would choose with the prompt's",
    "assistant_early_exit": "assisted decoding: guessed tokens would choose with the prompt's",
}
# Rotary tables of several axes say where in an image a token is: counted anew, that would be lost.
AXES = "mrope_section"
CACHES = (None, "dynamic", "dynamic_full")


class Guarded:
    """`generate` of one model, without the ways that would be silently wrong.

    Args:
        model: Whose `generate` it stands for.
        paused: Tells whether nothing is dropped now, so that every way is right.
    """

    def __init__(self, model: PreTrainedModel, paused: Callable[[], bool]) -> None:
        found: Any = model
        self._model, self._paused, self._generate = model, paused, found.generate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate; arguments are those of transformers' `generate`.

        Raises:
            UsageError: The prompt would be read in a way in which tokens cannot be dropped.
        """
        if not self._paused():
            self._check(inspect.signature(self._generate).bind(*args, **kwargs).arguments)
        return self._generate(*args, **kwargs)

    def _check(self, given: dict[str, Any]) -> None:
        """Check the arguments of `generate`, those without a name of their own under "kwargs"."""
        config = given.get("generation_config") or self._model.generation_config
        said = {**given, **given.get("kwargs", {})}
        for name, why in REFUSED.items():
            if said.get(name, getattr(config, name, None)) is not None:
                raise UsageError(
                    f"{name}: {why}", hint="generate without it, or under structprune.paused(model)"
                )
        cache = said.get("cache_implementation", getattr(config, "cache_implementation", None))
        if cache not in CACHES:
            raise UsageError(
                f"cache_implementation={cache!r}: such a cache cannot lose tokens",
                hint="use the default cache: leave cache_implementation out",
            )


def check_computed_once(blocks: Sequence[nn.Module]) -> None:
    """Check that no block is computed a second time for its gradients, when what it dropped is forgotten.

    Raises:
        UsageError: One is.
    """
    if any(block.training and getattr(block, "gradient_checkpointing", False) for block in blocks):
        raise UsageError(
            "gradient checkpointing computes blocks twice, the second time without knowing what was dropped",
            hint="train without gradient checkpointing, or under structprune.paused(model)",
        )


def check_runs(model: PreTrainedModel, tower_layers: Sequence[float] = ()) -> None:
    """Check that tokens of a model can be dropped.

    Args:
        model: In memory, or on the meta device.
        tower_layers: Layers of its vision tower whose attention must be readable.

    Raises:
        UsageError: It reads no images, or its attention forgets by windows of its own, or its blocks know no
            cache by a name that is known here, or there is no such layer.
    """
    placeholder(model.config)
    text = model.config.get_text_config()
    for layer in DynamicCache(config=text).layers:
        if type(layer) is not DynamicLayer:
            raise UsageError(
                f"{model.config.model_type}: cache layers of kind {type(layer).__name__} cannot lose tokens",
                hint="token pruners take models whose every block attends to all earlier tokens",
            )
    found: Any = model.base_model
    # A cache that went unseen would still be filled, with rows of which later tokens know nothing.
    block = type(blocks(model, arch_of(model))[0][1])
    if not {*CACHE_NAMES} & {*inspect.signature(block.forward).parameters}:
        raise UsageError(
            f"{block.__name__}: takes no cache under any name that is known: {', '.join(CACHE_NAMES)}",
            hint="use a version of transformers that was tested; `structprune env` tells which is there",
        )
    for wanted in tower_layers:
        layer_number(wanted, len(tower_attentions(found)))


def has_several_axes(config: PreTrainedConfig) -> bool:
    """Tell whether positions of a model say where in an image a token is."""
    return AXES in (getattr(config.get_text_config(), "rope_parameters", None) or {})
