"""Pruners after which a model is smaller: a share of its units leaves, and some blocks are protected."""

from collections.abc import Mapping, Sequence
from typing import Self

from pydantic import model_validator

from structprune.decide.sparsity import Share
from structprune.decide.targets import SkippedBlocks
from structprune.errors import UsageError
from structprune.models.arch import blocks
from structprune.models.identity import names_of
from structprune.models.streamed import Model
from structprune.plan.key import Key
from structprune.plan.plan import PlanWriter
from structprune.plan.promise import Listed
from structprune.pruners.blockwise import BlockwisePruner


class StructurePruner(SkippedBlocks, BlockwisePruner):
    """A pruner after which tensors are smaller or gone.

    Args:
        sparsity: Share of the parameters of the units that may leave, in the blocks not skipped, that leaves.
    """

    sparsity: Share = 0.2

    @model_validator(mode="before")
    @classmethod
    def _know_scores(cls, data: object) -> object:
        """Refuse to keep scores where none would serve another goal."""
        if isinstance(data, Mapping) and data.get("keep_scores") and "keep_scores" not in cls.model_fields:
            raise ValueError(f"keep_scores: {cls.method()} decides on all units together and keeps no scores")
        return data

    @property
    def removes_something(self) -> bool:
        """Tell whether anything leaves."""
        return self.sparsity > 0

    def with_goal(self, goal: float | str) -> Self:
        """Return the same pruner with another sparsity.

        Raises:
            UsageError: It cannot be this one.
        """
        return self.with_field("sparsity", goal)


def check_named_once(units: Sequence[str]) -> None:
    """Check that no kind of unit is named twice.

    Raises:
        ValueError: One is.
    """
    if len({*units}) < len(units):
        raise ValueError(f"units: {', '.join(units)} names one twice")


def check_untied(model: Model, index: int) -> None:
    """Check that no tensor of a block is also one of something else, which would change with it.

    Args:
        model: In memory, streamed, or a twin.
        index: The block's.

    Raises:
        UsageError: One is; names both.
    """
    prefix, _ = blocks(model)[index]
    for alias, main in names_of(model).aliases.items():
        if alias.startswith(f"{prefix}.") or main.startswith(f"{prefix}."):
            raise UsageError(
                f"{alias}: is the same tensor as {main}, so it cannot leave or become smaller alone",
                hint=f"leave block {index} as it is (skip), or store the tensors apart",
            )


def bias_key(weight: str) -> Key:
    """Return the key of the new value of the bias beside a stored weight."""
    return Key(f"{weight.removesuffix('weight')}bias", "value")


def left_shapes(writer: PlanWriter, model: Model) -> dict[tuple[int, ...], list[str]]:
    """Return the stored tensors that a plan cuts or creates, by the shape that it leaves of them.

    Args:
        writer: Holds the plan's blocks.
        model: The model as it is.
    """
    before = names_of(model).expected()
    shapes: dict[str, list[int]] = {}
    for block in writer.blocks:
        for key in block:
            if key.edit == "keep":
                shapes.setdefault(key.name, list(before[key.name]))[key.axis] = block.shapes[key][0]
            elif key.edit == "value" and key.name not in before:
                shapes[key.name] = list(block.shapes[key])
    found: dict[tuple[int, ...], list[str]] = {}
    for name, shape in shapes.items():
        found.setdefault(tuple(shape), []).append(name)
    return found


def left_lists(writer: PlanWriter, model: Model) -> list[Listed]:
    """Return the numbered lists of the files of which a plan leaves some members only.

    Args:
        writer: Holds the plan's blocks.
        model: The model as it is.
    """
    before = names_of(model).expected()
    found = []
    for block in writer.blocks:
        for key in (key for key in block if key.edit == "members"):
            inside = (name.removeprefix(f"{key.name}.") for name in before if name.startswith(f"{key.name}."))
            members = {name.partition(".")[0] for name in inside}
            found.append(Listed(name=key.name, stay=block.shapes[key][0], of=len(members)))
    return found
