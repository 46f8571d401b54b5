"""Where the images of a forward are among its tokens."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from structprune.errors import UsageError
from structprune.runtime.tower import SmallerImages


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a forward, row by row of the batch.

    Attributes:
        number: Of every token the number of its image, counted over the whole batch, -1 for text and padding;
            shape [batch, tokens].
        newline: Whether a token of an image only ends a line of it, shape [batch, tokens].
        real: Whether a token is no padding, shape [batch, tokens].
    """

    number: Tensor
    newline: Tensor
    real: Tensor

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


def find_images(
    ids: Tensor, config: PreTrainedConfig, sizes: Sequence[int], real: Tensor | None
) -> Images | None:
    """Return where the images are; None where there are none.

    Args:
        ids: Input ids of the forward, shape [batch, tokens].
        config: The vision-language model's, which names the placeholder of images.
        sizes: Tokens of every image in order, as far as the model told.
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
    if sum(sizes) == count:
        lengths = torch.tensor([*sizes], device=ids.device)
        number[visual] = torch.arange(len(lengths), device=ids.device).repeat_interleave(lengths)
    else:  # the caller gave features of its own: what is not parted by text is one image
        before = torch.nn.functional.pad(visual, (1, 0))[:, :-1]
        number[visual] = ((visual & ~before).flatten().cumsum(0) - 1).view_as(ids)[visual]
    return Images(number, torch.zeros_like(visual), real)


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
    return Images(images.number, ends, images.real)


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
    """`get_image_features` of one model, which tells how many tokens each image has.

    Args:
        method: What it stands for.
        note: Told the sizes, in order.
        smaller: Returns what makes images smaller first; None where nothing does now.
    """

    def __init__(
        self,
        method: Callable[..., Any],
        note: Callable[[Sequence[int]], None],
        smaller: Callable[[], SmallerImages | None],
    ) -> None:
        self._method, self._note, self._smaller = method, note, smaller
        # `generate` asks for the names of its parameters.
        self.__signature__ = inspect.signature(method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the method returns."""
        smaller = self._smaller()
        if smaller is None:
            found = self._method(*args, **kwargs)
        else:
            found = smaller.features(self._method, args, kwargs)
        features = found.pooler_output if hasattr(found, "pooler_output") else found[0]
        self._note([len(one) for one in features])
        return found
