"""What is known of a block before any data: its units, what they cost, which matrices read them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from structprune.calibration.statistics import Statistics
from structprune.decide.unit_counts import KINDS, UnitCosts, UnitCounts, WidthUnit, counts_of, unit_costs
from structprune.models.arch import Arch, arch_of, blocks
from structprune.models.groups import BlockKeep, BlockSizes, block_sizes, spread
from structprune.models.identity import skeleton
from structprune.models.streamed import Model

ATTENTION: tuple[WidthUnit, ...] = ("kv_group", "head")


@dataclass(frozen=True)
class WidthBlock:
    """One block.

    Attributes:
        prefix: Its path in the model.
        module: The block; its parameters may be on the meta device.
        arch: Its family's row.
        sizes: What it has.
        costs: Parameters of its units; none of those that do not leave.
        biases: Linears that are counted with a bias though they have none, by their path.
    """

    prefix: str
    module: nn.Module
    arch: Arch
    sizes: BlockSizes
    costs: UnitCosts
    biases: Sequence[str] = ()

    @property
    def there(self) -> UnitCounts:
        """Return how many units it has."""
        return counts_of(self.sizes)

    def units(self, kind: WidthUnit) -> int:
        """Return how many units of a kind are scored; heads are, each for itself."""
        return self.sizes.heads if kind == "head" else self.there.of(kind)

    def competing(self, scores: Mapping[WidthUnit, Tensor]) -> dict[WidthUnit, Tensor]:
        """Return the scores of what may leave at once: the lowest head of every key-value head, the next ...

        Args:
            scores: By kind, shape [units] each.
        """
        each: dict[WidthUnit, Tensor] = {kind: one for kind, one in scores.items() if kind != "head"}
        if "head" in scores:
            sorted_heads = scores["head"].view(self.sizes.kv_heads, -1).sort(dim=1).values
            each["head"] = sorted_heads.sum(dim=0)
        return each

    @property
    def new_biases(self) -> int:
        """Return how many parameters it gets with its biases, before any unit leaves."""
        return sum(len(self.module.get_parameter(f"{path}.weight")) for path in self.biases)

    def count_biases(self, paths: Sequence[str]) -> "WidthBlock":
        """Return the block with what its units cost once these linears have a bias."""
        kinds = [kind for kind in KINDS if self.costs.of(kind)]
        return replace(self, biases=paths, costs=unit_costs(self.module, self.arch, kinds, paths))

    def lacks_bias(self, path: str) -> bool:
        """Tell whether the linear at a path has no bias."""
        return self.module.get_submodule(path)._parameters.get("bias") is None

    def removable(self, least: UnitCounts) -> int:
        """Return the parameters of what can leave where at least so many units stay of each kind."""
        there = self.there
        left = UnitCounts(*(min(least.of(kind), there.of(kind)) for kind in ("kv_group", "channel", "head")))
        return there.cost(self.costs) - left.cost(self.costs)

    @property
    def readers(self) -> dict[WidthUnit, tuple[str, int]]:
        """Return which matrix reads the units of each kind that leaves, and how many columns it has."""
        found: dict[WidthUnit, tuple[str, int]] = {}
        for kind in ATTENTION:
            if self.costs.of(kind):
                found[kind] = (self.arch.o, self.sizes.heads * self.sizes.head_dim)
        if self.costs.channel:
            found["channel"] = (self.arch.down, self.sizes.channels)
        return found

    def columns(self, kind: WidthUnit, keep: BlockKeep) -> Tensor | None:
        """Return which columns stay of the matrix that reads a kind of unit; None where all do."""
        if kind == "channel":
            return keep.channels
        return None if keep.heads is None else spread(keep.heads, self.sizes.head_dim)


@dataclass(frozen=True)
class NotedMean(Statistics):
    """The mean of an input, from the notes of a first look."""

    noted: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def mean(self) -> Tensor:
        """Return the mean of each input feature, shape [in], float32."""
        return self.noted


def width_block(model: Model, index: int, kinds: Sequence[WidthUnit]) -> WidthBlock:
    """Return what is known of one block.

    Args:
        model: In memory, streamed, or a twin.
        index: Which block.
        kinds: What may leave.

    Raises:
        UsageError: The family's parts are not known.
    """
    module = skeleton(model)
    arch = arch_of(module)
    prefix, block = blocks(module, arch)[index]
    return WidthBlock(prefix, block, arch, block_sizes(block, arch), unit_costs(block, arch, kinds))
