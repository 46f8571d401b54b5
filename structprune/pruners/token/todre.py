"""ToDRE: visual tokens stay that add up to the largest distances; late ones all go where nobody looks.

Source: Li et al. 2025, https://arxiv.org/abs/2505.18757
The first pick is what the class token looks at most, of an image in tiles in the whole one. The second stage
is one block at 7/8 of the depth; the default of `tau` is ours, the paper fits it. An image that lost
nothing at the embeddings, because all of it shall stay, loses nothing later.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from structprune.decide.token_target import Target
from structprune.errors import UsageError
from structprune.models.arch import block_prefixes
from structprune.models.streamed import Model
from structprune.plan.plan import Plan
from structprune.pruners.forecast import Forecast
from structprune.pruners.token._family import TokenPruner
from structprune.pruners.token._scored import finite
from structprune.pruners.token._staged import scaled
from structprune.runtime.drop import Drop
from structprune.runtime.flops import BlockCost
from structprune.runtime.keep_set import KeepSet
from structprune.runtime.tower_seen import what_attends
from structprune.runtime.view import View
from structprune.solvers.max_sum import max_sum

# Of 32 blocks, the one before which all tokens may go; and how many tokens of an image say what it looks at.
LATE, ASKED = 28, 64


class ToDre(TokenPruner):
    """Maximise the sum of cosine distances between kept tokens, greedily; later drop all, or none.

    Args:
        tau: All tokens of an image go before a late block where at most this share of the text's attention
            is on them, and at most this share of theirs on text; 0: never, 1: always.
    """

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.1))
    tau: Annotated[float, Field(ge=0, le=1)] = 0.02

    tower_layers: ClassVar = (-1,)
    paper_positions: ClassVar = "compact"

    @property
    def at_most(self) -> bool:
        """Tell whether fewer than the target may be left: none in the last blocks."""
        return self.tau > 0

    def facts(self, model: PreTrainedModel) -> dict[str, str]:
        """Return what the first pick is made by."""
        return {"attention": what_attends(model)}

    def forecast(self, model: Model) -> Forecast:
        """Return how many pairs of a visual token and a block are not computed, at least.

        Raises:
            UsageError: As for every method; or there is no late block.
        """
        if self.tau and len(block_prefixes(model)) < 2:
            raise UsageError("tau: a model with one block has no late one to drop tokens at", hint="tau: 0")
        return super().forecast(model)

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return what cosines with every pick cost, and a row of attention for text and for those asked."""
        left = counts[-1][1]
        rows = (1 + min(left, ASKED)) * left * cost.queries if self.tau else 0
        return left * size * cost.hidden + rows

    def drops(self, plan: Plan, model: Model) -> list[Drop]:
        """Return what the engine carries out on a model; its last stage leaves the number to `choose`."""
        found = super().drops(plan, model)
        if not found or not self.tau:
            return found
        blocks = len(block_prefixes(model))
        late = min(max(scaled(LATE, blocks), 1), blocks - 1)
        return [*found, Drop(late, False, None, self, found[0].compact)]

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return tokens that are far apart, or late all or none, bool, shape [images, tokens].

        Raises:
            QualityError: A feature or an attention is not finite.
        """
        if seen.block:
            return seen.real & ~self._unused(seen)[:, None]
        features = finite(seen.features(), seen.real, self.method())
        paid = finite(seen.tower(-1).attention, seen.real, self.method())
        first = paid.masked_fill(~seen.real | (seen.places[..., 0] > 0), -torch.inf).argmax(1)
        return max_sum(features, seen.real, keep, first)

    def _unused(self, seen: View) -> Tensor:
        """Return of which images, that lost tokens before, text and tokens look past each other."""
        place = torch.arange(seen.real.shape[1], device=seen.real.device)
        asking = seen.real & (place % -(-seen.left // ASKED)[:, None] == 0)
        paid = seen.paid_by_text().sum(1), paid_to_text(seen, asking)
        lost = seen.left + seen.protected < seen.sizes
        return lost & (torch.stack(paid) <= self.tau).all(0)


def paid_to_text(seen: View, asking: Tensor) -> Tensor:
    """Return the share of attention that tokens [images, tokens] of each image pay to text, [images]."""
    assert seen.read is not None
    number, asks = seen.images.number, seen.marked(asking)
    if seen.kept is not None:
        number, asks = seen.kept.gather(number), seen.kept.gather(asks)
    queries = KeepSet.of(asks & seen.computed)
    rows = seen.read.rows(queries.index).mean(1)[..., seen.read.keys.shape[2] - number.shape[1] :]
    text = ((number < 0) & seen.computed)[:, : rows.shape[2]].to(rows)
    paid = torch.einsum("bqk,bk->bq", rows, text) * queries.valid
    found = torch.zeros(number.shape, device=rows.device).scatter_add(1, queries.index, paid)
    return seen.spread(found).sum(1) / asking.sum(1)
