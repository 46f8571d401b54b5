"""Where the images of a forward are among its tokens."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from structprune.errors import UsageError
from structprune.runtime.tower import FewerFeatures
from structprune.runtime.tower_seen import ImageShown, TowerRun, features_of, shown_of


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a forward, row by row of the batch.

    Attributes:
        number: Of every token the number of its image, counted over the whole batch, -1 for text and padding;
            shape [batch, tokens].
        newline: Whether a token of an image only ends a line of it, shape [batch, tokens].
        real: Whether a token is no padding, shape [batch, tokens].
        shown: What the vision tower showed of each image; None where others made its features.
    """

    number: Tensor
    newline: Tensor
    real: Tensor
    shown: Sequence[ImageShown | None] = ()

    @property
    def visual(self) -> Tensor:
        """Return whether a token is one of an image, shape [batch, tokens]."""
        return self.number >= 0

    @cached_property
    def sizes(self) -> Tensor:
        """Return how many tokens each image has, shape [images]."""
        found = self.number[self.visual]
        return torch.bincount(found) if len(found) else found

    @cached_property
    def row(self) -> Tensor:
        """Return in which row of the batch each image is, shape [images]."""
        row, place = self.visual.nonzero(as_tuple=True)
        return torch.zeros_like(self.sizes).scatter(0, self.number[row, place], row)

    @cached_property
    def after(self) -> Tensor:
        """Return of every image which tokens are text after it, in its row, bool [images, tokens]."""
        row, place = self.visual.nonzero(as_tuple=True)
        ends = torch.zeros_like(self.sizes).scatter_reduce(0, self.number[row, place], place, "amax")
        text = self.real & ~self.visual
        return text[self.row] & (torch.arange(text.shape[1], device=text.device) > ends[:, None])

    @cached_property
    def last(self) -> Tensor:
        """Return which token is the last real one of its row, bool [batch, tokens]."""
        later = self.real.flip(1).cumsum(1).flip(1)
        return self.real & (later == 1)


@dataclass(frozen=True)
class Features:
    """What is known of an image whose features stand among the embeddings.

    Attributes:
        tokens: How many there are.
        shown: What the vision tower showed of it; None where others made its features.
    """

    tokens: int
    shown: ImageShown | None

    @classmethod
    def of(cls, output: Any) -> list["Features"]:
        """Return what is known of each image in what `get_image_features` returned."""
        return [cls(len(one), shown_of(one)) for one in features_of(output)]


def find_images(
    ids: Tensor, config: PreTrainedConfig, features: Sequence[Features], real: Tensor | None
) -> Images | None:
    """Return where the images are; None where there are none.

    Args:
        ids: Input ids of the forward, shape [batch, tokens].
        config: The vision-language model's, which names the placeholder of images.
        features: Those of every image in order, as far as the model told.
        real: Whether a token is no padding, shape [batch, tokens]; None where none is.
    """
    if ids.is_meta:  # only sizes are asked for, and which tokens are visual nobody can read
        return None
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    visual = (ids == placeholder(config)) & real
    count = int(visual.sum())
    if not count:
        return None
    number = torch.full_like(ids, -1)
    shown: list[ImageShown | None] = []
    if sum(one.tokens for one in features) == count:
        shown = [one.shown for one in features]
        lengths = torch.tensor([one.tokens for one in features], device=ids.device)
        number[visual] = torch.arange(len(lengths), device=ids.device).repeat_interleave(lengths)
    else:  # the caller gave features of its own: what is not parted by text is one image
        before = torch.nn.functional.pad(visual, (1, 0))[:, :-1]
        number[visual] = ((visual & ~before).flatten().cumsum(0) - 1).view_as(ids)[visual]
    return Images(number, torch.zeros_like(visual), real, shown)


def with_newlines(images: Images, embeddings: Tensor, newline: Tensor | None) -> Images:
    """Return the images with those tokens marked that only end a line.

    Args:
        images: Where they are.
        embeddings: What the language model reads, shape [batch, tokens, hidden].
        newline: The parameter that stands for the end of a line, shape [hidden]; None where a model has none.
    """
    if newline is None:
        return images
    ends = (embeddings == newline.to(embeddings)).all(-1) & images.visual
    return replace(images, newline=ends)


def placeholder(config: PreTrainedConfig) -> int:
    """Return the id of the token in whose place the features of an image are put.

    Raises:
        UsageError: The model has none, so it reads no images.
    """
    found = getattr(config, "image_token_id", None)
    if found is None:
        found = getattr(config, "image_token_index", None)
    if found is None:
        raise UsageError(
            f"a {config.model_type} reads no images, so it has no visual tokens to drop",
            hint="token pruners take vision-language models, such as LLaVA or Qwen2.5-VL",
        )
    return int(found)


class ImageFeatures:
    """`get_image_features` of one model, which tells what the images show.

    Args:
        model: Whose it is, without its head.
        note: Told what is known of each image, in order.
        fewer: Returns what lets the tower compute fewer features; None where nothing does now.
        looking: Lets a call look into the vision tower, for the length of a `with`.
    """

    def __init__(
        self,
        model: Any,
        note: Callable[[Sequence[Features]], None],
        fewer: Callable[[], FewerFeatures | None],
        looking: Callable[[TowerRun], AbstractContextManager[None]],
    ) -> None:
        self._model, self._method = model, model.get_image_features
        self._note, self._fewer, self._looking = note, fewer, looking
        # `generate` asks for the names of its parameters.
        self.__signature__ = inspect.signature(self._method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the method returns."""
        given = self.__signature__.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        run = TowerRun(self._model, given, self._fewer())
        with self._looking(run):
            # By name: defaults of the config are added to what was said so.
            found = self._method(**(given if run.call is None else run.call.given))
        run.mark(found)
        self._note(Features.of(found))
        return found
