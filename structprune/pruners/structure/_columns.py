"""Methods of width that score columns: what reads a head or a channel tells how much it matters."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import final

from torch import Tensor

from structprune.calibration.statistics import Statistics
from structprune.decide.answers import check_scores, unchanged
from structprune.decide.unit_counts import WidthUnit
from structprune.models.arch import Linear
from structprune.models.groups import BlockSizes
from structprune.pruners.seen import Seen
from structprune.pruners.structure._width import WidthPruner
from structprune.pruners.structure._width_block import WidthBlock


class ColumnPruner(WidthPruner):
    """A pruner that scores the columns of the attention's output and the feed-forward's down projection."""

    @abstractmethod
    def score(self, weight: Tensor, seen: Statistics) -> Tensor:
        """Return the importance of each column, shape [in], float32; a higher one stays.

        Args:
            weight: Of the matrix that reads the units, shape [out, in], in the model's dtype.
            seen: Holds the parts that the method declares.
        """

    def comparable(self, columns: Tensor) -> Tensor:
        """Return a matrix's scores on a scale that those of all matrices share, shape [in]."""
        return columns

    def unit_scores(self, kind: WidthUnit, columns: Tensor, sizes: BlockSizes) -> Tensor:
        """Return the scores of units, shape [units]: the sum over the columns of each.

        Args:
            kind: Which units.
            columns: What `comparable` returned, shape [in].
            sizes: The block's.
        """
        if kind == "channel":
            return columns
        return columns.view(sizes.heads if kind == "head" else sizes.kv_heads, -1).sum(dim=1)

    @final
    def score_units(
        self, known: WidthBlock, readers: Mapping[WidthUnit, Linear], seen: Seen
    ) -> dict[WidthUnit, Tensor]:
        """Return the scores of units from those of their columns."""
        columns = {kind: self.comparable(self._column_scores(one, seen)) for kind, one in readers.items()}
        return {kind: self.unit_scores(kind, one, known.sizes) for kind, one in columns.items()}

    def _column_scores(self, linear: Linear, seen: Seen) -> Tensor:
        whose = self.called(linear.label)
        with unchanged(linear.weight, whose):
            found = self.score(linear.weight, seen.of(linear))
        return check_scores(found, linear.weight.shape[1:], whose)
