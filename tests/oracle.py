"""What runs with fewer tokens are held against: all tokens computed, no cache, dropped columns hidden."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from structprune.errors import UsageError
from structprune.pruners import catalogue
from structprune.pruners.token._family import TokenPruner
from structprune.pruners.token._tower import TowerPruner
from structprune.runtime.attach import engine_of
from structprune.runtime.cache import PrunedLayer
from tests.pictures import END, FAMILIES, IMAGE, START, VIDEO, Pictures, vision_model

TOKEN_METHODS = sorted(name for name in catalogue.names() if issubclass(catalogue.find(name), TokenPruner))
KERNELS = ["sdpa", "eager"]


def token_pruner(method: str, **fields: Any) -> TokenPruner:
    """Build a token pruner; unless told otherwise it keeps three tokens of ten, where they were."""
    usual: dict[str, Any] = {"target": {"keep_ratio": 0.3}, "positions": "keep"}
    found = catalogue.find(method).model_validate(usual | fields)
    assert isinstance(found, TokenPruner)
    return found


def takes(method: str, model: PreTrainedModel) -> bool:
    """Tell whether a method can prune a model."""
    try:
        token_pruner(method).forecast(model)
    except UsageError:
        return False
    return True


_MODELS = {family: vision_model(family) for family in FAMILIES}
# One method on every family, every method on one family; the rest of the product is slow.
CASES = [
    pytest.param(
        method,
        family,
        kernel,
        id=f"{method}-{family}-{kernel}",
        marks=[] if kernel == "sdpa" and (family == "llava" or method == "fastv") else [pytest.mark.slow],
    )
    for method in TOKEN_METHODS
    for family in FAMILIES
    for kernel in KERNELS
    if takes(method, _MODELS[family])
]


@contextmanager
def pruned(
    model: PreTrainedModel, pruner: TokenPruner, batch: dict[str, Tensor]
) -> Iterator[PreTrainedModel]:
    """Let a model run with fewer tokens, as decided on a batch, for the length of a `with`."""
    plan = pruner.calibrate(model, [batch])
    pruner.apply(model, plan)
    try:
        yield model
    finally:
        pruner.undo(model, plan)


@dataclass(frozen=True, eq=False)
class Merge:
    """What went into which tokens before a block.

    Attributes:
        block: Its number.
        past: How many tokens earlier forwards had.
        weights: Row j holds how much of every token of the forward went into its token j, float32
            [batch, tokens, tokens].
    """

    block: int
    past: int
    weights: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """Return states [batch, tokens, hidden] of all tokens so far with what was merged."""
        end = self.past + self.weights.shape[1]
        return torch.cat(
            [states[:, : self.past], self.weights @ states[:, self.past : end], states[:, end:]], 1
        )


@contextmanager
def merging(model: PreTrainedModel) -> Iterator[list[Merge]]:
    """Note what a pruned model merges, for the length of a `with`; methods must be applied before."""
    found: list[Merge] = []

    def note(*_: object) -> None:
        engine = engine_of(model)
        assert engine is not None and engine._local.run is not None
        run = engine._local.run
        for seen, chosen, weights in run.merges:
            whole = torch.eye(run.length).repeat(run.batch, 1, 1)
            for image, number in enumerate(seen.number):
                row, places = (seen.candidates & (seen.images.number == number)).nonzero(as_tuple=True)
                there = chosen[image, : len(places)]
                part = weights[image, : len(places), : len(places)]
                whole[row[0], places[there]] = 0
                whole[row[0], places[there][:, None], places] = part[there]
            found.append(Merge(seen.block, run.past, whole))

    last = [*model.get_submodule("model.language_model.layers").children()][-1]
    handle = last.register_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def column_sets(layer: CacheLayerMixin, padding: Tensor) -> list[list[int]]:
    """Return of every row the logical columns that a cache layer holds and shows, counted after padding."""
    if not isinstance(layer, PrunedLayer):
        assert layer.keys is not None
        length = layer.keys.shape[-2]
        return [[*range(length - int(pad))] for pad in padding]
    columns, valid = layer.seen_columns(len(padding), torch.device("cpu"))
    rows = zip(columns, valid, padding, strict=True)
    found = [[int(c) for c in (row[seen] - pad)] for row, seen, pad in rows]
    # A layer from before padding was dropped holds it; the model's mask hides it there.
    return [[column for column in row if column >= 0] for row in found]


def padding_of(batch: dict[str, Tensor]) -> Tensor:
    """Return how many tokens of padding stand on the left of every row."""
    return batch["attention_mask"].eq(0).sum(1)


def longer(batch: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Return a batch with more tokens of text at the end."""
    found = dict(batch)
    found["input_ids"] = torch.cat([batch["input_ids"], ids], 1)
    found["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(ids)], 1)
    if "mm_token_type_ids" in batch:
        kinds = (ids == IMAGE).to(batch["mm_token_type_ids"])
        found["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], kinds], 1)
    return found


@torch.no_grad()
def masked_dense(
    family: str,
    inputs: dict[str, Tensor],
    cache: Cache,
    *,
    compact: bool = False,
    spared: TokenPruner | None = None,
    merges: Sequence[Merge] = (),
) -> Tensor:
    """Return the logits of a model that computes all tokens, and whose blocks hide what a cache has not.

    Args:
        family: Of the model, whose weights are those of `vision_model(family)`.
        inputs: The whole conversation.
        cache: Of the run with fewer tokens.
        compact: Whether every block counts the positions of what it has.
        spared: What lets its tower compute fewer features, if anything does.
        merges: What that run merged.
    """
    model = vision_model(family, attention="eager")
    batch, length = inputs["input_ids"].shape
    blocks = model.get_submodule("model.language_model.layers")
    with ExitStack() as hooks:
        done: list[Merge] = []
        if merges and hasattr(model.model.language_model, "_deepstack_process"):
            model.model.language_model._deepstack_process = partial(_add, done)
        for index, (block, layer) in enumerate(zip(blocks.children(), cache.layers, strict=True)):
            mix = partial(_mix, done, [one for one in merges if one.block == index])
            hooks.callback(block.register_forward_pre_hook(mix).remove)
            shown = _shown(layer, batch, length)
            hide = partial(_hide, ~shown)
            if compact:
                places = (shown & inputs["attention_mask"].bool()).cumsum(1) - 1
                turn = partial(_turn, model.model.language_model.rotary_emb, places.clamp(min=0))
                hooks.callback(block.register_forward_pre_hook(turn, with_kwargs=True).remove)
            hooks.callback(block.register_forward_pre_hook(hide, with_kwargs=True).remove)
        shown = _shown(cache.layers[0], batch, length)
        if spared is not None:
            made = _smaller if spared.method() == "downsample" else partial(_spared, spared)
            inputs = made(model, inputs, shown)
        return model(**inputs, use_cache=False).logits


def _smaller(model: Any, inputs: dict[str, Tensor], shown: Tensor) -> dict[str, Tensor]:
    """Return inputs with features of smaller images, one by one in the place of the tokens shown."""
    places = inputs["input_ids"].eq(IMAGE) & shown
    side = round((int(places.sum()) / len(inputs["pixel_values"])) ** 0.5)
    patch = model.config.vision_config.patch_size
    pixels = nn.functional.interpolate(
        inputs["pixel_values"], scale_factor=side * patch / 32, mode="bicubic", antialias=True
    )
    found = model.model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True)
    states = model.get_input_embeddings()(inputs["input_ids"])
    states[places] = torch.cat(found.pooler_output)
    return {"inputs_embeds": states, "attention_mask": inputs["attention_mask"]}


def _spared(pruner: TokenPruner, model: Any, inputs: dict[str, Tensor], shown: Tensor) -> dict[str, Tensor]:
    """Return inputs with the features that a tower makes that is spared; what is not shown has none."""
    names = ("pixel_values", "image_sizes")
    with pruned(model, pruner, inputs):
        found = model.model.get_image_features(**{name: inputs[name] for name in names if name in inputs})
    states, visual = model.get_input_embeddings()(inputs["input_ids"]), inputs["input_ids"].eq(IMAGE)
    states[visual] = torch.cat([*found.pooler_output])
    assert not bool(states[visual & shown].eq(0).all(-1).any())
    return {"inputs_embeds": states, "attention_mask": inputs["attention_mask"]}


def spared(method: str, **fields: Any) -> TokenPruner | None:
    """Return a pruner as `token_pruner` does, if it lets the vision tower compute fewer features."""
    found = token_pruner(method, **fields)
    return found if isinstance(found, TowerPruner) else None


def _shown(layer: CacheLayerMixin, batch: int, length: int) -> Tensor:
    shown = torch.ones(batch, length, dtype=torch.bool)
    if isinstance(layer, PrunedLayer) and layer.columns is not None and layer.valid is not None:
        shown[:, : layer.selected] = False
        for row in range(batch):
            shown[row, layer.columns[row][layer.valid[row]]] = True
    return shown


def _hide(hidden: Tensor, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    mask = kwargs["attention_mask"]
    assert mask.dtype == torch.float32 and mask.shape[-1] == hidden.shape[1]
    least = torch.finfo(mask.dtype).min
    return args, kwargs | {"attention_mask": mask.masked_fill(hidden[:, None, None], least)}


def _mix(done: list[Merge], merges: list[Merge], _: nn.Module, args: Any) -> Any:
    states = args[0]
    for merge in merges:
        states = merge(states)
    done += merges
    return (states, *args[1:])


def _add(done: list[Merge], states: Tensor, visual: Tensor, features: Tensor) -> Tensor:
    """Return states with features of the tower, which were merged like the states."""
    whole = torch.zeros_like(states)
    whole[visual] = features
    for merge in done:
        whole = merge(whole)
    return states + whole


def _turn(rotary: nn.Module, places: Tensor, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, kwargs | {"position_embeddings": rotary(args[0], places)}


def worst(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a part of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def dropped_columns(cache: Cache) -> int:
    """Return how many columns the layers of a cache lack."""
    return sum(
        layer.get_seq_length() - layer.keys.shape[-2] for layer in cache.layers if layer.keys is not None
    )


@torch.no_grad()
def generate(model: PreTrainedModel, inputs: dict[str, Tensor], **wanted: Any) -> Any:
    """Return five new tokens of every row with their logits and the cache."""
    return model.generate(
        **inputs,
        **{
            "max_new_tokens": 5,
            "do_sample": False,
            # No end, and nothing that a second reading would take for a picture.
            "suppress_tokens": [0, 1, 2, END, START, VIDEO, IMAGE],
            "output_logits": True,
            "return_dict_in_generate": True,
            **wanted,
        },
    )


def pictures(family: str, *counts: int) -> Pictures:
    """Return prompts with so many pictures each; two, one and none unless said otherwise."""
    return Pictures(family, counts or (2, 1, 0))
