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

from torch import Tensor, nn
from transformers import PreTrainedModel

from structprune.errors import UsageError
from structprune.runtime.patches import TowerPatches, has_class_token, patches_of
from structprune.runtime.tower import FewerFeatures, TowerCall
from structprune.runtime.tower_attention import TowerAttention

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
