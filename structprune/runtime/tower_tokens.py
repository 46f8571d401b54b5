"""What the vision tower showed of the tokens that a method chooses from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from structprune.runtime.tower_seen import ImageShown, TowerRun


@dataclass(frozen=True, eq=False)
class TowerTokens:
    """What a layer of the vision tower showed of the tokens seen; newlines have zeros.

    Attributes:
        placed: Puts values of all tokens, image by image, where the tokens seen are.
        shown: What the tower showed of every image of the forward.
        layer: Which layer is looked at.
    """

    placed: Callable[[Sequence[Tensor]], Tensor]
    shown: Sequence[ImageShown]
    layer: float

    @cached_property
    def attention(self) -> Tensor:
        """Return what the class token pays, mean over heads, or as `received`; float32 [images, tokens].

        Of several patches in a token it is the mean.
        """
        return self.placed([one.attention(self.layer) for one in self.shown])

    @cached_property
    def received(self) -> Tensor:
        """Return the mean attention of all queries of the image and all heads, float32 [images, tokens]."""
        return self.placed([one.received(self.layer) for one in self.shown])

    @cached_property
    def keys(self) -> Tensor:
        """Return keys before rotation, mean over heads, float32 [images, tokens, size]."""
        return self.placed([one.keys(self.layer) for one in self.shown])

    def from_sinks(self, times: float) -> Tensor:
        """Return the mean attention of those queries that receive much, float32 [images, tokens].

        Args:
            times: How many times as much as the mean they receive, and more; where none does, as `received`.
        """
        return self._of_runs(lambda run: run.layer(self.layer).from_sinks(times))

    def of_pixels(self, values: Callable[[Tensor], Tensor]) -> Tensor:
        """Return values of the pixels of each token, the mean of its patches, float32 [images, tokens].

        Args:
            values: Told patches [..., patches, channels, pixels] as the tower gets them; returns a value of
                each, float32 [..., patches].
        """
        return self._of_runs(lambda run: run.of_pixels(values))

    def _of_runs(self, found: Callable[[TowerRun], list[Tensor]]) -> Tensor:
        runs = {id(one.run): one.run for one in self.shown}
        every = {key: found(run) for key, run in runs.items()}
        return self.placed([every[id(one.run)][one.number] for one in self.shown])
