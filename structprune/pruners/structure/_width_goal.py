"""How many units of each block stay: what was asked, where it may be unequal, what whole units allow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import Tensor

from structprune.decide.budgets.sigmoid import SigmoidBudget
from structprune.decide.budgets.unit_table import UnitTable
from structprune.decide.sparsity import share_below
from structprune.decide.unit_counts import (
    KINDS,
    Multiples,
    UnitCounts,
    WidthUnit,
    global_counts,
    legal_counts,
    uneven_counts,
    uniform_counts,
)
from structprune.errors import UsageError
from structprune.pruners.seen import UNMEASURED
from structprune.pruners.structure._width_block import WidthBlock

ByUnit = Mapping[WidthUnit, Tensor]
"""Of a block by kind of unit: scores, shape [units] each, or what their matrices read, shape [in] each."""
WORDS: Mapping[WidthUnit, str] = {
    "kv_group": "key-value groups",
    "head": "query heads of a key-value head",
    "channel": "channels",
}

UNEQUAL = (
    "{method} leaves blocks of unequal width: structprune opens them, and transformers with "
    "trust_remote_code; --uniform or --pad leave equal ones"
)


@dataclass(frozen=True)
class Share:
    """What the budget decided on a block.

    Attributes:
        stay: How many of its units stay.
        scores: Units' scores, where a first look has them.
        means: Means of what the matrices read, where a first look has them.
        importance: Of the block as a whole, where the budget knows it.
        room: For how many units its tensors have room, where some of them are to be zeros.
        measured: What the first look noted of the block.
        biases: Linears that get a bias, by their path in the block.
    """

    stay: UnitCounts
    scores: ByUnit = field(default_factory=dict)
    means: ByUnit = field(default_factory=dict)
    importance: float | None = None
    room: UnitCounts | None = None
    measured: Tensor = UNMEASURED
    biases: Sequence[str] = ()

    @property
    def stored(self) -> UnitCounts:
        """Return how many units the block's tensors have afterwards."""
        return self.room or self.stay


@dataclass(frozen=True)
class WidthGoal:
    """How much is to leave, and how it may be spread.

    Attributes:
        asked_by: What was asked for behind its key, for errors.
        share: Of the parameters of units, the part that leaves.
        budget: As a width method has it.
        multiples: Of what the numbers that stay are multiples.
    """

    asked_by: str
    share: Fraction
    budget: Any
    multiples: Multiples

    def shares_before(self, found: Sequence[WidthBlock]) -> dict[int, Share]:
        """Return how many units of each block stay, as far as that is known before any data."""
        if isinstance(self.budget, UnitTable):
            stay = self.budget.counts([one.there for one in found], [one.costs for one in found])
        else:
            stay = [uniform_counts(one.there, one.costs, self.share, self.multiples) for one in found]
        return {index: Share(one) for index, one in enumerate(stay)}

    def shares(
        self, found: Sequence[WidthBlock], measured: Sequence[Tensor], *, means: bool, per_parameter: bool
    ) -> dict[int, Share]:
        """Return how many units of each block stay, decided by a first look at all of them.

        Args:
            found: The blocks.
            measured: What was noted of each: its angular distance where the budget asks for it, then of each
                kind of unit the scores, and the means where they are.
            means: Whether they are.
            per_parameter: Whether competing units are ranked by score per parameter.
        """
        there, costs = [one.there for one in found], [one.costs for one in found]
        importance: list[float] | None = None
        rows = measured
        if isinstance(self.budget, SigmoidBudget):
            importance = self.budget.importance([float(numbers[0]) for numbers in measured])
            measured = [numbers[1:] for numbers in measured]
            sizes = [one.cost(cost) for one, cost in zip(there, costs, strict=True)]
            shares = self.budget.shares(importance, sizes, float(self.share))
            stay = uneven_counts(shares, there, costs, self.multiples)
        noted = [_read(one, numbers.float(), means) for one, numbers in zip(found, measured, strict=True)]
        if self.budget == "global":
            ranked = [
                {
                    kind: one / known.costs.of(kind) if per_parameter else one
                    for kind, one in known.competing(scores).items()
                }
                for known, (scores, _) in zip(found, noted, strict=True)
            ]
            stay = global_counts(ranked, there, costs, self.share, self.multiples)
        elif importance is None:
            stay = [one.stay for one in self.shares_before(found).values()]
        return {
            index: Share(one, *notes, importance[index] if importance else None, measured=rows[index])
            for index, (one, notes) in enumerate(zip(stay, noted, strict=True))
        }

    def check(self, found: Sequence[WidthBlock]) -> None:
        """Check that whole units allow anything to leave.

        Raises:
            UsageError: They do not; says how many may stay.
        """
        of = sum(one.there.cost(one.costs) for one in found)
        before = self.shares_before(found)
        if isinstance(self.budget, UnitTable):  # these very sizes were asked for
            return
        if any(before[index].stay != one.there for index, one in enumerate(found)):
            most = sum(one.removable(UnitCounts(1, 1)) for one in found)
            largest = max(one.costs.of(kind) for one in found for kind in KINDS)
            if self.share * of > most + Fraction(largest, 2):
                raise UsageError(
                    f"{self.asked_by} is more than may leave: of a block at least one unit of a kind stays",
                    hint=f"ask for at most {share_below(most, of)}, or skip fewer blocks",
                )
            return
        # Where all of a model compete, a single unit may leave that is too much for its block alone.
        parts = [
            (each * (there - legal[0]), kind, legal)
            for one in found
            for kind, there, each, legal in _kinds(one, self.multiples)
            if legal
        ]
        least = min((size for size, _, _ in parts), default=None)
        unequal = self.budget == "global" or isinstance(self.budget, SigmoidBudget)
        if least is not None and unequal and least < 2 * self.share * of:
            return
        said = "; ".join(
            f"{' or '.join(map(str, legal)) or 'no other number'} of {there} {WORDS[kind]} can stay"
            for kind, there, _, legal in next(_kinds(one, self.multiples) for one in found if one.readers)
        )
        raise UsageError(
            f"{self.asked_by} rounds to nothing: in a block {said}",
            hint="ask for more, choose a smaller multiple, or let channels leave, too (units)",
        )


def _kinds(known: WidthBlock, multiples: Multiples) -> list[tuple[WidthUnit, int, int, list[int]]]:
    """Return of each kind of unit that may leave: how many there are, what one costs, how many can stay."""
    there, costs = known.there, known.costs
    return [
        (kind, there.of(kind), costs.of(kind), legal_counts(there.of(kind), multiples.of(kind)))
        for kind in KINDS
        if costs.of(kind)
    ]


def _read(known: WidthBlock, numbers: Tensor, with_means: bool) -> tuple[ByUnit, ByUnit]:
    """Return the scores and the means that were noted one after another."""
    scores: dict[WidthUnit, Tensor] = {}
    means: dict[WidthUnit, Tensor] = {}
    rest = numbers
    for kind, (_, width) in known.readers.items():
        units = known.units(kind)
        scores[kind], rest = rest[:units], rest[units:]
        if with_means:
            means[kind], rest = rest[:width], rest[width:]
    return scores, means
