"""ARMOR: an N:M core between two block-diagonal wrappers.

Source: Liu et al. 2025, https://arxiv.org/abs/2510.05528

The paper optimises wrappers and core with Adam; here the loss never rises. `solver: adam` exists to compare.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from structprune.calibration.statistics import Parts, Statistics
from structprune.decide.sparsity import Pattern, pattern_of
from structprune.errors import UsageError
from structprune.models.arch import Linear
from structprune.models.names import Names
from structprune.models.streamed import Model
from structprune.plan.key import Key
from structprune.pruners.weight import _products
from structprune.pruners.weight._family import WeightPruner
from structprune.pruners.weight._promises import Promise
from structprune.solvers.armor.descent import ArmorSearch, check_sizes, effort_of_armor, factorise_weight
from structprune.solvers.effort import Effort
from structprune.solvers.matrix import MatrixToPrune, PrunedMatrix


class Armor(WeightPruner):
    """Store a weight as left @ core @ right: the core holds N:M, the wrappers are block-diagonal.

    Args:
        sparsity: The core's pattern, "N:M".
        wrapper_size: Side of the wrappers' blocks; unless given, the largest that divides 128 and the side.
        proxy: What is minimised: "diagonal" weighs inputs as the paper does, "gram" is the outputs' error.
        solver: "descent" in closed form, or the paper's "adam", which exists to compare.
        rounds: Rounds of the solver at most; with "adam" so many steps.
        seed: Draws the groups of the core that move together; a recipe's seed unless given.
        fold: Write the product as an ordinary dense matrix: any loader opens it, and nothing in it is zero.
        propagate: Which outputs later blocks see, of pruned or of dense blocks; the paper's see dense ones.
    """

    sparsity: Pattern = "2:4"
    wrapper_size: Annotated[int, Field(ge=1)] | None = None
    proxy: Literal["diagonal", "gram"] = "diagonal"
    solver: Literal["descent", "adam"] = "descent"
    rounds: Annotated[int, Field(ge=1)] = 20
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    fold: bool = False
    propagate: Literal["pruned", "dense"] = "dense"

    repairs: ClassVar[tuple[str, ...]] = ()

    @property
    def needs(self) -> Parts:
        """Return what is remembered of an input: its norm, or with `proxy: gram` its Gram matrix."""
        return frozenset({"gram"}) if self.proxy == "gram" else frozenset({"norm"})

    @property
    def leaves_zeros(self) -> bool:
        """Tell whether the written matrices hold the zeros: a folded product is dense."""
        return not self.fold

    def misfit(self, linear: Linear) -> str:
        """Return why a linear cannot be factorised as asked, "" when it can."""
        if reason := ("" if self.fold else _products.unstorable(linear)) or super().misfit(linear):
            return reason
        try:
            out, inputs = linear.weight.shape
            check_sizes((out, inputs), pattern_of(self.sparsity) or (1, 1), self._wrappers(linear.weight))
        except UsageError as error:
            return error.message
        return ""

    def effort(self, rows: int, inputs: int) -> Effort:
        """Return what the rounds take at most."""
        return effort_of_armor(rows, inputs, self.wrapper_size, self.rounds, gram=self.proxy == "gram")

    def solve(self, matrices: Sequence[MatrixToPrune], seen: Statistics) -> list[PrunedMatrix]:
        """Return the factors of the matrices that read the same input, or their products.

        Args:
            matrices: The matrices, each [out, in].
            seen: Of their input the norms, shape [in], or the Gram matrix, shape [in, in].
        """
        return [self._solved(one, seen.gram if self.proxy == "gram" else seen.norm) for one in matrices]

    def _solved(self, matrix: MatrixToPrune, inputs: Tensor) -> PrunedMatrix:
        assert matrix.pattern is not None
        search = ArmorSearch(rounds=self.rounds, seed=self.seed, proxy=self.proxy, solver=self.solver)
        found = factorise_weight(matrix.weight, inputs, matrix.pattern, self._wrappers(matrix.weight), search)
        facts = {"nowag_loss": found.initial, "losses": found.losses}
        if self.fold:  # nothing leaves a dense product: its mask is all True
            return PrunedMatrix(found.mask | True, weight=found.dense(), facts=facts)
        return PrunedMatrix(found.mask, factors=found, facts=facts)

    def stage_facts(self, model: Model) -> dict[str, Any]:
        """Return what is to be told of the stage, and how its linears are stored."""
        return super().stage_facts(model) | {"note": _products.FOLDED if self.fold else _products.STORED}

    def outline(self, names: Names, targets: Sequence[Linear]) -> Mapping[Key, tuple[int, ...]]:
        """Return the shapes of the products' parts."""
        return _products.part_outline(names, self._products(targets))

    def config_patch(self, targets: Sequence[Linear]) -> dict[str, Any]:
        """Return the key of config.json that lists the products."""
        return _products.products_patch(self._products(targets))

    def stored_promises(
        self, names: Names, targets: Sequence[Linear], leaving: Mapping[str, int]
    ) -> list[Promise]:
        """Return what the files must show of the products."""
        pattern = pattern_of(self.sparsity)
        return _products.product_promises(names, self._products(targets), pattern) if pattern else []

    def _products(self, targets: Sequence[Linear]) -> _products.Products:
        return [] if self.fold else [(one, self._wrappers(one.weight)) for one in targets]

    def _wrappers(self, weight: Tensor) -> tuple[int, int]:
        return _products.wrapper_sizes(weight, self.wrapper_size)
