"""ARMOR: an N:M core between two block-diagonal wrappers.

Source: Liu et al. 2025, https://arxiv.org/abs/2510.05528

The paper optimises wrappers and core with Adam; here the loss never rises. `solver: adam` exists to compare.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from structprune.calibration.statistics import Gram, InputNorm
from structprune.decide.sparsity import Pattern, pattern_of
from structprune.errors import UsageError
from structprune.models.arch import LANGUAGE_MODELS, Linear
from structprune.models.factored import CONFIG_KEY, part_names, part_shapes
from structprune.models.names import Names
from structprune.models.streamed import Model
from structprune.plan.key import Key
from structprune.plan.promise import Gone, Removed, Reshaped
from structprune.pruners.weight._family import WeightPruner
from structprune.solvers.armor.descent import check_sizes, factorise
from structprune.solvers.nowag import normalise
from structprune.solvers.solution import Solution, Task

WRAPPER = 128  # the paper's

PRODUCTS = (
    "linears are stored as products of a sparse core and two wrappers; the folder opens with "
    "`structprune.load`, and in plain transformers with `trust_remote_code=True`"
)
FOLDED = "products are folded into dense matrices: nothing in them is zero"


class Armor(WeightPruner):
    """Store a weight as left @ core @ right: the core holds N:M, the wrappers are block-diagonal.

    Args:
        sparsity: The core's pattern, "N:M".
        wrapper_size: Side of the wrappers' blocks; unless given, the largest that divides 128 and the side.
        proxy: What is minimised: "diagonal" weighs inputs as the paper does, "gram" is the outputs' error.
        solver: "descent" in closed form, or the paper's "adam", which exists to compare.
        rounds: Rounds of the solver at most; with "adam" so many steps.
        fold: Write the product as an ordinary dense matrix: any loader opens it, and nothing in it is zero.
        propagate: Whether later blocks see the outputs of pruned or of dense blocks; the paper's see dense
            ones.
    """

    sparsity: Pattern = "2:4"
    wrapper_size: Annotated[int, Field(ge=1)] | None = None
    proxy: Literal["diagonal", "gram"] = "diagonal"
    solver: Literal["descent", "adam"] = "descent"
    rounds: Annotated[int, Field(ge=1)] = 20
    fold: bool = False
    propagate: Literal["pruned", "dense"] = "dense"

    statistic: ClassVar = InputNorm
    repairs: ClassVar = ("none",)

    @property
    def needs(self) -> type[InputNorm]:
        """Return what is remembered of an input: with `proxy: gram` its Gram matrix."""
        return Gram if self.proxy == "gram" else InputNorm

    @property
    def leaves_zeros(self) -> bool:
        """Tell whether the written matrices hold the zeros: a folded product is dense."""
        return not self.fold

    def misfit(self, linear: Linear) -> str:
        """Return why a linear cannot be factorised as asked, "" when it can."""
        kinds = {"a fused expert": linear.expert is not None, "a Conv1D": linear.transposed}
        # transformers does not rename the tensors of a class that comes with the folder.
        kinds["a vision-language model's"] = linear.label.startswith(tuple(LANGUAGE_MODELS.values()))
        if kind := "" if self.fold else next((kind for kind, found in kinds.items() if found), ""):
            return f"{kind} cannot be stored as a product (--fold writes the product itself)"
        if reason := super().misfit(linear):
            return reason
        try:
            out, inputs = linear.weight.shape
            check_sizes((out, inputs), pattern_of(self.sparsity) or (1, 1), self._wrappers(linear.weight))
        except UsageError as error:
            return error.message
        return ""

    def score(self, weight: Tensor, stat: InputNorm) -> Tensor:
        """Return NoWag-P's score, where the search starts, shape [out, in], float32; a higher score is kept.

        Args:
            weight: Shape [out, in], in the model's dtype.
            stat: L2 norm of each input feature over all calibration tokens, shape [in].
        """
        return normalise(weight).score(stat.norm)

    def solve(self, tasks: Sequence[Task], stat: Any) -> list[Solution]:
        """Return the factors of the matrices that read the same input, or their products.

        Args:
            tasks: The matrices, each [out, in].
            stat: What is remembered of their input: norms, shape [in], or a Gram matrix, shape [in, in].
        """
        return [self._solved(task, stat.gram if self.proxy == "gram" else stat.norm) for task in tasks]

    def _solved(self, task: Task, inputs: Tensor) -> Solution:
        assert task.pattern is not None
        how: dict[str, Any] = {"rounds": self.rounds, "proxy": self.proxy, "solver": self.solver}
        found = factorise(task.weight, inputs, task.pattern, self._wrappers(task.weight), **how)
        facts = {"nowag_loss": found.initial, "losses": found.losses}
        if self.fold:
            return Solution(found.mask | True, weight=found.dense(), facts=facts)
        return Solution(found.mask, factors=found, facts=facts)

    def _facts(self, model: Model) -> dict[str, Any]:
        return super()._facts(model) | {"note": FOLDED if self.fold else PRODUCTS}

    def _outline(self, names: Names, chosen: Sequence[Linear]) -> Mapping[Key, tuple[int, ...]]:
        shapes: dict[Key, tuple[int, ...]] = {}
        for linear in () if self.fold else chosen:
            parts = part_shapes(tuple(linear.weight.shape), self._wrappers(linear.weight))
            for part, name in part_names(names.stored_of[linear.name][0]).items():
                shapes[Key(name, "factor")] = parts[part]
        return shapes

    def _patch(self, chosen: Sequence[Linear]) -> dict[str, Any]:
        listed = {} if self.fold else {one.label: list(self._wrappers(one.weight)) for one in chosen}
        return {CONFIG_KEY: listed} if listed else {}

    def _stored_promises(
        self, names: Names, chosen: Sequence[Linear], leaving: Mapping[str, int]
    ) -> list[Removed | Reshaped | Gone]:
        pattern = pattern_of(self.sparsity)
        if not chosen or pattern is None:
            return []
        wholes = [names.stored_of[linear.name][0] for linear in chosen]
        cores = tuple(part_names(whole)["core.weight"] for whole in wholes)
        kept, of = pattern
        return [
            Removed(tensors=cores, per="group", removed=of - kept, of=of),
            Gone(tensors=tuple(wholes)),
            *(
                Reshaped(tensors=(key.name,), shape=shape)
                for key, shape in self._outline(names, chosen).items()
            ),
        ]

    def _wrappers(self, weight: Tensor) -> tuple[int, int]:
        size, (out, inputs) = self.wrapper_size, weight.shape
        return (size, size) if size else (math.gcd(out, WRAPPER), math.gcd(inputs, WRAPPER))
