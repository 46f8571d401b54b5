"""What the vision tower shows of images: where each token is, and what some layers attend to.

What an attention of the tower reads is noted while it runs. Rows are computed from that anew when a method
asks for them, in float32, whatever kernel the tower runs. It hangs on the features themselves, because
`generate` makes those before any forward, and repeats them for its beams.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from structprune.errors import UsageError
from structprune.runtime.attention import rotated
from structprune.runtime.patches import TowerPatches, has_class_token, patches_of
from structprune.runtime.tower import FewerFeatures, TowerCall

# Queries whose attention is in memory at once.
CHUNK = 256
_ATTRIBUTE = "_structprune_shown"


def tower_attentions(model: nn.Module) -> list[nn.Module]:
    """Return the attentions of a model's vision tower whose rows can be computed anew, first layer first.

    Args:
        model: A vision-language model without its head.
    """
    tower = getattr(model, "vision_tower", None) or getattr(model, "visual", None)
    return [] if tower is None else [one for one in tower.modules() if _is_readable(one)]


def _is_readable(module: nn.Module) -> bool:
    asks = inspect.signature(module.forward).parameters
    if "qkv" in module._modules:
        return "cu_seqlens" in asks
    # Rotary tables beside separate projections, as Pixtral has, come in forms of their own.
    return {"q_proj", "k_proj"} <= {*module._modules} and "position_embeddings" not in asks


def what_attends(model: PreTrainedModel, *, class_token: bool = True) -> str:
    """Return in words whose attention counts: that of the class token, where it is asked for, or of all."""
    if not has_class_token(model.base_model):
        return (
            "mean over all queries of the vision tower, which has no class token, and the patches of a token"
        )
    return "class token of the vision tower" if class_token else "mean over all queries of the vision tower"


def layer_number(layer: float, layers: int) -> int:
    """Return which of so many layers is meant, counted from 0.

    Args:
        layer: An integer counts layers, from the end where it is negative; a float is a share of the depth.
        layers: How many there are.

    Raises:
        UsageError: There is no such layer.
    """
    number = int(layer * layers) if isinstance(layer, float) else layer + layers * (layer < 0)
    if not 0 <= number < layers:
        raise UsageError(
            f"layer {layer} of the vision tower: it has {layers} whose attention can be read",
            hint="choose a method that does not look into the tower",
        )
    return number


@dataclass(frozen=True, eq=False)
class TowerAttention:
    """What one attention of the tower read.

    Attributes:
        module: The attention.
        states: Its input, [squares, patches, hidden], or [patches, hidden] where segments stand in one row.
        given: What else it is given, by name.
    """

    module: Any
    states: Tensor
    given: dict[str, Any]

    @cached_property
    def _projected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys, and keys before rotation, float32 [rows, heads, patches, size]."""
        module = self.module
        with torch.no_grad():
            if "qkv" in module._modules:
                both = module.qkv(self.states).float().unflatten(-1, (3, module.num_heads, -1))
                queries, keys, _ = both[None].transpose(1, 3).unbind(2)
                cos, sin = (one[None] for one in self.given["position_embeddings"])
                return rotated(queries, cos, sin), rotated(keys, cos, sin), keys
            projected = (one(self.states) for one in (module.q_proj, module.k_proj))
            queries, keys = (one.unflatten(-1, (-1, module.head_dim)).float() for one in projected)
        return queries.transpose(1, 2), keys.transpose(1, 2), keys.transpose(1, 2)

    @cached_property
    def _segments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys of patches that see one another, and which entries are patches.

        Returns:
            Float32 [segments, heads, patches, size] twice, and bool [segments, patches]; shorter segments are
            filled up on the right.
        """
        queries, keys, _ = self._projected
        ends = self.given.get("cu_seqlens")
        if ends is None:
            return queries, keys, torch.ones_like(queries[:, 0, :, 0], dtype=torch.bool)
        lengths = ends.diff().to(queries.device)
        queries, keys = (
            pad_sequence([*torch.split(one[0].transpose(0, 1), lengths.tolist())], batch_first=True)
            for one in (queries, keys)
        )
        real = torch.arange(queries.shape[1], device=lengths.device) < lengths[:, None]
        return queries.transpose(1, 2), keys.transpose(1, 2), real

    def _paid(self, start: int, end: int, asking: Tensor | None = None) -> Tensor:
        """Return what a run of patches of each segment pays to all of it, summed, mean over heads.

        Args:
            start: Where the run begins.
            end: Where it ends.
            asking: Which patches count, bool [segments, patches]; all unless given.

        Returns:
            Float32 [segments, patches].
        """
        queries, keys, real = self._segments
        asking = real if asking is None else asking
        scores = queries[:, :, start:end] @ keys.transpose(2, 3) * self.module.head_dim**-0.5
        paid: Tensor = scores.masked_fill_(~real[:, None, None], -torch.inf).softmax(-1).mean(1)
        return (paid * asking[:, start:end, None]).sum(1)

    @cached_property
    def received(self) -> Tensor:
        """Return what patches receive, mean over heads, summed over queries, shape as the states'."""
        return self._in_order(self._summed(self._segments[2]))

    def from_sinks(self, times: float) -> Tensor:
        """Return as much of `received` as if all asked as those that receive so many times the mean.

        Where none of those that see one another receives more, all ask.
        """
        real = self._segments[2]
        every = self._summed(real)
        # What all receive adds up to how many they are: the mean is one.
        sinks = (every > times) & real
        asking = torch.where(sinks.any(1, keepdim=True), sinks, real)
        found = every if torch.equal(asking, real) else self._summed(asking)
        return self._in_order(found * (real.sum(1) / asking.sum(1))[:, None])

    def _summed(self, asking: Tensor) -> Tensor:
        """Return what patches receive from some, mean over heads, float32 [segments, patches]."""
        found = torch.zeros_like(asking, dtype=torch.float32)
        for start in range(0, asking.shape[1], CHUNK):
            found += self._paid(start, start + CHUNK, asking)
        return found

    def _in_order(self, values: Tensor) -> Tensor:
        """Return values of segments in the shape of the states."""
        return values if self.states.ndim == 3 else values[self._segments[2]]

    @cached_property
    def paid_by_first(self) -> Tensor:
        """Return what the first patch of each square pays, mean over heads, float32 [squares, patches]."""
        return self._paid(0, 1)

    @property
    def keys(self) -> Tensor:
        """Return keys before rotation, mean over heads, float32, shape as the states'."""
        found = self._projected[2].mean(1)
        return found if self.states.ndim == 3 else found[0]


@dataclass(frozen=True, eq=False)
class LayerShown:
    """What one layer of the tower showed, image by image.

    Attributes:
        read: What its attention read.
        patches: How patches become tokens.
    """

    read: TowerAttention
    patches: TowerPatches

    @cached_property
    def attention(self) -> list[Tensor]:
        """Return what the class token pays to each token, or what tokens receive; float32 [tokens]."""
        if not self.patches.class_token:
            return self.received
        return [one[:, 0] for one in self.patches.packed(self.read.paid_by_first[..., None])]

    @cached_property
    def received(self) -> list[Tensor]:
        """Return what each token receives, mean over all queries of its image, float32 [tokens]."""
        return self._shared(self.read.received)

    def from_sinks(self, times: float) -> list[Tensor]:
        """Return what each token receives from those that receive so many times the mean, as `received`."""
        return self._shared(self.read.from_sinks(times))

    def _shared(self, received: Tensor) -> list[Tensor]:
        found = received / self.patches.asking.to(received.device)
        return [one[:, 0] for one in self.patches.packed(found[..., None])]

    @cached_property
    def keys(self) -> list[Tensor]:
        """Return the key of each token, float32 [tokens, size]."""
        return self.patches.packed(self.read.keys)


class TowerRun:
    """What the tower showed in one call of `get_image_features`.

    Args:
        model: Whose call it is, without its head.
        given: The arguments of the call, by name.
        fewer: What lets the tower compute fewer features; None where it computes all.

    Attributes:
        call: What it does in this call.
    """

    def __init__(self, model: nn.Module, given: dict[str, Any], fewer: FewerFeatures | None = None) -> None:
        self.patches = patches_of(model, given)
        self.call: TowerCall | None = None
        if fewer is not None:
            self.call = fewer.begin(given, class_token=self.patches.class_token)
        self._layers = len(tower_attentions(model))
        self._shown: dict[int, LayerShown] = {}

    def note(self, number: int, read: TowerAttention) -> None:
        """Note what the attention of a layer reads."""
        self._shown[number] = LayerShown(read, self.patches)

    def layer(self, layer: float) -> LayerShown:
        """Return what a layer showed.

        Raises:
            UsageError: Nobody looked.
        """
        found = self._shown.get(layer_number(layer, self._layers))
        if found is None:
            raise unseen(f"layer {layer} of the vision tower was not looked at when they were made")
        return found

    @cached_property
    def filled(self) -> list[Tensor] | None:
        """Return of every image which tokens have features, bool [tokens]; None where all have."""
        if self.call is None:
            return None
        marks = self.call.filled[..., None].float().cpu()
        return [one[:, 0] > 0 for one in self.patches.packed(marks)]

    def among_all(self, features: Tensor) -> Tensor:
        """Return features of patches [squares, fewer, hidden] with zeros where patches have none."""
        assert self.call is not None
        there = self.patches.selected(self.call.filled.to(features.device))
        found = features.new_zeros(*there.shape, features.shape[-1])
        found[there] = features.flatten(0, 1)
        return found

    def of_pixels(self, values: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return a value of the pixels of each token, the mean of its patches; float32 [tokens] per image."""
        return [one[:, 0] for one in self.patches.packed(values(self.patches.pixels)[..., None])]

    def mark(self, output: Any) -> None:
        """Let the features of each image know what the tower showed of it.

        Args:
            output: What the call returned.
        """
        for number, one in enumerate(features_of(output)):
            setattr(one, _ATTRIBUTE, ImageShown(self, number))


@dataclass(frozen=True, eq=False)
class ImageShown:
    """What the tower showed of one image.

    Attributes:
        run: The call that made its features.
        number: Which of the images of that call.
    """

    run: TowerRun
    number: int

    @property
    def filled(self) -> Tensor | None:
        """Return which tokens have features, bool [tokens]; None where the tower computed all of them."""
        return None if self.run.filled is None else self.run.filled[self.number]

    @property
    def places(self) -> Tensor:
        """Return part, row and column of its tokens, long [tokens, 3]."""
        return self.run.patches.places[self.number]

    def attention(self, layer: float) -> Tensor:
        """Return what the class token pays to each token at a layer, or what tokens receive; [tokens]."""
        return self.run.layer(layer).attention[self.number]

    def received(self, layer: float) -> Tensor:
        """Return what each token receives at a layer, mean over all queries, float32 [tokens]."""
        return self.run.layer(layer).received[self.number]

    def keys(self, layer: float) -> Tensor:
        """Return the key of each token at a layer, float32 [tokens, size]."""
        return self.run.layer(layer).keys[self.number]


def unseen(why: str) -> UsageError:
    """Return what to raise where it is not known what the tower showed of an image."""
    return UsageError(
        f"features of images: {why}",
        hint="pass pixel_values, or features that this model makes while the method is applied to it",
    )


def features_of(output: Any) -> Sequence[Tensor]:
    """Return the features of each image in what `get_image_features` returned, as a tuple or by names."""
    found: Sequence[Tensor] = output.pooler_output if hasattr(output, "pooler_output") else output[0]
    return found


def shown_of(features: Tensor) -> ImageShown | None:
    """Return what the tower showed of the image that has these features; None where it did not make them."""
    found = getattr(features, _ATTRIBUTE, None)
    assert found is None or isinstance(found, ImageShown)
    return found
