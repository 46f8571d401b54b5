"""How values of the vision tower's patches become values of tokens: by the model's own packing."""

from functools import cached_property
from math import ceil
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution
from transformers.vision_utils import get_vision_window_index

# What a caller may give of windows that are known already.
ORDER = frozenset({"window_index", "cu_window_seqlens"})


class TowerPatches(Protocol):
    """Patches and tokens of the images of one call of `get_image_features`."""

    @property
    def class_token(self) -> bool:
        """Return whether the first patch of each image is none, but stands for the whole."""
        ...

    @property
    def asking(self) -> Tensor:
        """Return how many patches ask in the image of each patch; shape [] or [patches]."""
        ...

    @property
    def places(self) -> list[Tensor]:
        """Return part, row and column of every token, image by image, long [tokens, 3]."""
        ...

    @property
    def pixels(self) -> Tensor:
        """Return what patches show, [squares, patches, 3, pixels] or [patches, 3, pixels]; class tokens 0."""
        ...

    def selected(self, values: Tensor) -> Tensor:
        """Return values of those patches, [squares, patches, ...], that become tokens."""
        ...

    def packed(self, values: Tensor) -> list[Tensor]:
        """Return values of patches as values of tokens, image by image.

        Args:
            values: Shape [squares, patches, values] of a tower that sees squares, else [patches, values].

        Returns:
            Of every image [tokens, values]; zero where a token only ends a line.
        """
        ...


class SquarePatches:
    """A tower that sees every image as a square, or as several (LLaVA, LLaVA-NeXT).

    Args:
        model: A vision-language model without its head.
        given: The arguments of the call, by name.
    """

    def __init__(self, model: Any, given: dict[str, Any]) -> None:
        self._model, self._vision = model, model.config.vision_config
        self._sizes: Any = given.get("image_sizes")
        strategy = given.get("vision_feature_select_strategy")
        self._strategy = strategy or model.config.vision_feature_select_strategy
        self._pixels = given["pixel_values"]
        self.class_token = has_class_token(model)

    @property
    def _side(self) -> int:
        found: int = self._vision.image_size // self._vision.patch_size
        return found

    @property
    def asking(self) -> Tensor:
        """Return how many patches a square has, and the token that stands for it."""
        return torch.tensor(self._side**2 + self.class_token)

    @cached_property
    def _tiles(self) -> list[int] | None:
        """Return how many squares each image is, itself among them; None where it is one."""
        if not hasattr(self._model, "pack_image_features"):
            return None
        pinpoints, side = self._model.config.image_grid_pinpoints, self._vision.image_size
        best = [select_best_resolution((*map(int, one),), pinpoints) for one in self._sizes]
        return [1 + ceil(height / side) * ceil(width / side) for height, width in best]

    @property
    def pixels(self) -> Tensor:
        """Return what patches of each square show."""
        given, patch = self._pixels, self._vision.patch_size
        if self._tiles is not None and given.ndim == 5:
            given = torch.cat([one[:count] for one, count in zip(given, self._tiles, strict=True)])
        cut = given.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))
        found = cut.permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2)
        return torch.nn.functional.pad(found, (0, 0, 0, 0, int(self.class_token), 0))

    def selected(self, values: Tensor) -> Tensor:
        """Return values without those of the first patch where the model leaves it out."""
        return values[:, 1:] if self._strategy == "default" else values

    def packed(self, values: Tensor, end: float = 0.0) -> list[Tensor]:
        """Return values of patches as values of tokens; `end` where a token only ends a line."""
        values = self.selected(values)
        if self._tiles is None:
            return [*values]
        found: list[Tensor] = self._model.pack_image_features(
            torch.split(values, self._tiles),
            self._sizes,
            vision_feature_select_strategy=self._strategy,
            image_newline=values.new_full((values.shape[-1],), end),
        )[0]
        return found

    @cached_property
    def places(self) -> list[Tensor]:
        """Return part, row and column of every token: of the whole image, then of its stitched tiles."""
        squares = len(self._pixels) if self._tiles is None else sum(self._tiles)
        whole = _raster(self._side, self._side)
        if self.class_token:
            whole = torch.cat([whole.new_tensor([[0, -1, -1]]), whole])
        packed = self.packed(whole.float().expand(squares, -1, -1), torch.nan)
        return [_stitched(one, self._side**2) for one in packed]


class GridPatches:
    """A tower that sees every image as a grid of its own, and makes one token of some patches (Qwen's)."""

    class_token = False

    def __init__(self, model: Any, given: dict[str, Any]) -> None:
        self._tower, self._sizes = model.visual, given["image_grid_thw"]
        self._pixels = given["pixel_values"]
        self._order = {name: given[name] for name in ORDER & {*given}}

    @property
    def asking(self) -> Tensor:
        """Return how many patches the image of each patch has."""
        sizes = self._sizes.prod(-1)
        found: Tensor = sizes.repeat_interleave(sizes)
        return found

    @property
    def pixels(self) -> Tensor:
        """Return what patches show, of the frames that make one."""
        found: Tensor = self._pixels.unflatten(-1, (3, -1))
        return found

    def selected(self, values: Tensor) -> Tensor:
        """Return all values."""
        return values

    def packed(self, values: Tensor) -> list[Tensor]:
        """Return the mean of the patches that become one token."""
        tower = self._tower
        unit = tower.spatial_merge_size**2
        found = values.view(-1, unit, values.shape[-1]).mean(1)
        if hasattr(tower, "window_size"):
            # Patches stand window by window there, and are put in order again when they are tokens.
            order, _ = get_vision_window_index(
                self._sizes, tower.spatial_merge_size, tower.window_size, tower.patch_size, {**self._order}
            )
            found = found[order.to(found.device).argsort()]
        return [*torch.split(found, (self._sizes.prod(-1) // unit).tolist())]

    @cached_property
    def places(self) -> list[Tensor]:
        """Return part, row and column of every token; frames of one image stand below one another."""
        unit = self._tower.spatial_merge_size
        return [
            _raster(times * rows // unit, columns // unit) for times, rows, columns in self._sizes.tolist()
        ]


def has_class_token(model: Any) -> bool:
    """Tell whether the vision tower of a model (without its head) has a token for the whole image."""
    embeddings = getattr(getattr(model, "vision_tower", None), "embeddings", None)
    return hasattr(embeddings, "class_embedding")


def patches_of(model: Any, given: dict[str, Any]) -> TowerPatches:
    """Return how a model packs the features that one call returns.

    Args:
        model: A vision-language model without its head.
        given: The arguments of its `get_image_features`, by name.
    """
    grids = given.get("image_grid_thw") is not None
    return GridPatches(model, given) if grids else SquarePatches(model, given)


def _raster(rows: int, columns: int) -> Tensor:
    """Return the places of a raster, part 0, long [rows * columns, 3]."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return torch.nn.functional.pad(places, (1, 0))


def _stitched(places: Tensor, whole: int) -> Tensor:
    """Return places of the whole image's tokens, then of stitched tiles, whose lines end with NaN."""
    ends = places[whole:, 0].isnan()
    if not bool(ends.any()):
        return places.long()
    # Places of a tile count within it: what packing left of all is counted anew, line by line.
    width = int(ends.int().argmax()) + 1
    order = torch.arange(len(ends))
    column = (order % width).masked_fill(ends, -1)
    tiles = torch.stack([torch.ones_like(order), order // width, column], 1)
    return torch.cat([places[:whole].long(), tiles])
