"""Patches merged inside the vision tower, between attention and feed-forward of its layers.

What is merged is a mean, weighted by how many patches each stands for, and stands in the place of the first
of them. With proportional attention a key counts as often as it stands for patches: the logarithm of that is
added to its scores.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from structprune.errors import UsageError
from structprune.models.streamed import Model, StreamedModel
from structprune.runtime.images import placeholder
from structprune.runtime.tower import TowerCall

# Kernels that add what they are given to the scores.
ADDING = ("eager", "sdpa")
# What a layer of a tower is made of where patches can be merged inside.
PARTS = frozenset({"self_attn", "layer_norm2", "mlp"})


def mergeable_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model's vision tower inside which patches can be merged, in order.

    Args:
        model: A vision-language model without its head.
    """
    tower = getattr(model, "vision_tower", None)
    every = [] if tower is None else tower.modules()
    return [one for one in every if {*one._modules} >= PARTS and hasattr(one.self_attn, "k_proj")]


def check_merges(model: Model) -> int:
    """Check that patches can be merged inside a model's vision tower.

    Returns:
        How many layers make its features.

    Raises:
        UsageError: They cannot; or it reads no images.
    """
    whole = model.skeleton if isinstance(model, StreamedModel) else model
    config: Any = model.config
    placeholder(config)
    name, layers = config.model_type, mergeable_layers(whole.base_model)
    hint = "choose a method that works behind the tower, such as divprune or visionzip"
    if not layers or not hasattr(whole.base_model, "multi_modal_projector"):
        raise UsageError(
            f"patches of a {name} cannot be merged inside its vision tower: only a LLaVA's or a LLaVA-NeXT's"
            " can, with a CLIP or a SigLIP; others merge patches by their place behind the last layer",
            hint=hint,
        )
    chosen = config.vision_feature_layer
    if not isinstance(chosen, int):
        raise UsageError(
            f"vision_feature_layer: {chosen}: features of several layers, which have different patches left",
            hint=hint,
        )
    has_class = hasattr(getattr(whole.base_model.vision_tower, "embeddings", None), "class_embedding")
    if has_class != (config.vision_feature_select_strategy == "default"):
        raise UsageError(
            f"vision_feature_select_strategy: {config.vision_feature_select_strategy}: its features are not"
            " those of all patches and nothing else",
            hint=hint,
        )
    return feature_layers(config)


def feature_layers(config: PreTrainedConfig) -> int:
    """Return how many layers of a LLaVA's tower make its features."""
    chosen: int = config.vision_feature_layer
    return chosen if chosen >= 0 else int(config.vision_config.num_hidden_layers) + 1 + chosen


def square_size(config: PreTrainedConfig) -> int:
    """Return how many patches a LLaVA's tower sees in one square."""
    return int(config.vision_config.image_size // config.vision_config.patch_size) ** 2


def check_adds(config: PreTrainedConfig) -> None:
    """Check that the tower's attention takes what is added to its scores.

    Raises:
        UsageError: Its kernel does not.
    """
    kernel = config.vision_config._attn_implementation
    if kernel not in ADDING:
        raise UsageError(
            f"the vision tower's attention {kernel!r} cannot count a key as often as it stands for patches",
            hint="open the model with attn_implementation='sdpa' or 'eager', or set proportional: false",
        )


@dataclass(frozen=True)
class MergedPatches:
    """Patches are merged inside the tower.

    Args:
        counts: How many patches of a square leave each layer that merges, the class token left out.
        match: Told the keys, float32 [squares, patches, size], how many patches shall go, and how many of the
            first may not; returns of every patch which one it goes into, itself where it stays, long
            [squares, patches].
        patches: Of a square at first.
        proportional: Whether a key counts as often as it stands for patches.
    """

    counts: Sequence[int]
    match: Callable[[Tensor, int, int], Tensor]
    patches: int
    proportional: bool

    def begin(self, given: dict[str, Any], *, class_token: bool) -> TowerCall:
        """Return a call in which patches are merged."""
        return MergingCall(self, given, class_token)


class MergingCall(TowerCall):
    """One call in which patches are merged.

    Args:
        how: What is merged.
        given: The arguments of the call, by name.
        class_token: Whether the first patch is none.

    Attributes:
        sizes: How many patches each one that is left stands for, float32 [squares, patches].
        places: The first of them, ascending, long [squares, patches].
    """

    def __init__(self, how: MergedPatches, given: dict[str, Any], class_token: bool) -> None:
        super().__init__(given, torch.ones(1, how.patches + class_token, dtype=torch.bool))
        self._how, self._class_token = how, class_token
        self._keys: Tensor | None = None
        self.sizes: Tensor | None = None
        self.places: Tensor | None = None

    def mask(self, states: Tensor) -> Tensor | None:
        """Return the logarithm of sizes, [squares, 1, 1, patches]; None where nothing is merged."""
        if self.sizes is None or not self._how.proportional:
            return None
        return self.sizes.log()[:, None, None].to(states.dtype)

    def note_keys(self, keys: Tensor) -> None:
        """Note the keys of a layer."""
        self._keys = keys.detach()

    def merged(self, layer: int, states: Tensor) -> Tensor | None:
        """Return what is left after merging in a layer."""
        if layer >= len(self._how.counts):
            return None
        squares, now = states.shape[:2]
        gone = now - self._class_token - self._how.counts[layer]
        if not gone:
            return None
        if self.sizes is None or self.places is None:
            self.sizes = torch.ones(squares, now, device=states.device)
            self.places = torch.arange(now, device=states.device).expand(squares, -1)
        assert self._keys is not None
        into = self._how.match(self._keys, gone, int(self._class_token))
        sizes = torch.zeros_like(self.sizes).scatter_add(1, into, self.sizes)
        weighted = states.float() * self.sizes[..., None]
        sums = torch.zeros_like(weighted).scatter_add(1, into[..., None].expand_as(weighted), weighted)
        places = self.places.scatter_reduce(1, into, self.places, "amin")
        # In the order of places, so that features stand in order among those of all patches.
        stays = into == torch.arange(now, device=into.device)
        order = places.masked_fill(~stays, int(places.max()) + 1).argsort(dim=1, stable=True)[:, : now - gone]
        self.sizes, self.places = sizes.gather(1, order), places.gather(1, order)
        found = sums.gather(1, order[..., None].expand(-1, -1, sums.shape[-1])) / self.sizes[..., None]
        filled = torch.zeros(squares, len(self.filled.T), dtype=torch.bool, device=states.device)
        self.filled = filled.scatter(1, self.places, True)
        return found.to(states.dtype)


class LayerHooks:
    """What one layer of the tower does differently while patches are merged.

    Args:
        index: Number of the layer.
        call: Returns the call of `get_image_features` that runs now in this thread, if any.
    """

    def __init__(self, index: int, call: Callable[[], TowerCall | None]) -> None:
        self._index, self._call = index, call
        self._size = 0

    def on(self, layer: Any) -> Iterator[tuple[nn.Module, Any, Any]]:
        """Yield modules of a layer, each with what is called before and after it; either may be None."""
        self._size = layer.self_attn.head_dim
        yield layer.self_attn, self._enter_attention, None
        yield layer.self_attn.k_proj, None, self._leave_keys
        yield layer.layer_norm2, self._enter_norm, None
        yield layer.mlp, None, self._leave_mlp
        yield layer, None, self._leave_layer

    def _enter_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._call()
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        mask = None if call is None else call.mask(states)
        return None if mask is None else (args, {**kwargs, "attention_mask": mask})

    def _leave_keys(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self._call()
        if call is not None and output is not None:
            call.note_keys(output.unflatten(-1, (-1, self._size)).float().mean(2))

    def _enter_norm(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._call()
        if call is None:
            return None
        merged = call.merged(self._index, args[0])
        call.within = None if merged is None else (args[0], merged)
        return None if merged is None else ((merged, *args[1:]), kwargs)

    def _leave_mlp(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self._call()
        if call is None or call.within is None or output is None:
            return None
        states, merged = call.within
        # The layer adds this to states that nobody reads any more; the sum is made where the layer returns.
        call.within = states, merged + output
        return torch.zeros_like(states)

    def _leave_layer(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self._call()
        if call is None or call.within is None or output is None:
            return None
        found, call.within = call.within[1], None
        return (found, *output[1:]) if isinstance(output, tuple) else found
