"""What a stage promises of the files: counts and shapes that a second code path can hold them to.

A decision says itself what it must lead to, so that nobody has to read a method's fields to check it.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]


class _Said(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Removed(_Said):
    """How many weights leave, row by row, group by group, or of a whole matrix.

    Attributes:
        tensors: Stored tensors. Each row or group of each of them loses `removed`; a matrix is all of them
            together (an expert's gate and up projection may be stored apart and compete as one).
        per: What loses so many: "row" of a weight seen as [out, in], "group" of consecutive inputs, "matrix".
        removed: How many weights leave each.
        of: Members of a group of consecutive inputs, the M of N:M; 0 for rows and matrices.
        transposed: The tensors are stored as [in, out]; never those of experts.
        expert: Which matrix of a stored tensor [experts, out, in] is meant; None for a tensor of its own.
    """

    kind: Literal["removed"] = "removed"
    tensors: Names
    per: Literal["row", "group", "matrix"]
    removed: Count
    of: Count = 0
    transposed: bool = False
    expert: Count | None = None


class Reshaped(_Said):
    """Stored tensors that have another shape afterwards, or that did not exist before."""

    kind: Literal["reshaped"] = "reshaped"
    tensors: Names
    shape: tuple[Count, ...]


class Gone(_Said):
    """Stored tensors that the files no longer hold."""

    kind: Literal["gone"] = "gone"
    tensors: Names


class Listed(_Said):
    """A numbered list, such as "model.layers", of which some members stay; those are numbered anew.

    Attributes:
        name: What stands before the number in the names of stored tensors.
        stay: How many members stay.
        of: Of how many.
    """

    kind: Literal["listed"] = "listed"
    name: str
    stay: Count
    of: Count


class Computed(_Said):
    """How many tokens of an image a block computes while the model runs.

    Attributes:
        block: The block's path in the model.
        attention: How many its attention computes, and its cache holds.
        feed_forward: How many its feed-forward computes.
        of: How many the image has.
        at_most: Whether it may be fewer, as the image has it.
    """

    kind: Literal["computed"] = "computed"
    block: str
    attention: Count
    feed_forward: Count
    of: Count
    at_most: bool = False


class Promises(_Said):
    """What one stage promises.

    Attributes:
        unit: What is counted, for people: "weights", "parameters", ...; no code depends on it.
        asked: What was asked for, as the user says it.
        removed: How many of them leave altogether: of weights, the sum over `stored`.
        of: Of how many.
        stored: What becomes of single stored tensors; what is not named keeps its shape and loses nothing.
    """

    unit: str
    asked: float | str
    removed: Count
    of: Count
    stored: tuple[
        Annotated[Removed | Reshaped | Gone | Listed | Computed, Field(discriminator="kind")], ...
    ] = ()
