"""Where a plan comes from: who decided, and on which architecture and weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from structprune.plan.block import canonical


class Architecture(BaseModel):
    """What ties a plan to models.

    Attributes:
        model_type: As config.json has it.
        shapes: Stored tensor -> its shape.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: str
    shapes: dict[str, tuple[Annotated[int, Field(ge=0)], ...]]

    @property
    def hash(self) -> str:
        """Return the hash of all of it."""
        rows = [[name, list(self.shapes[name])] for name in sorted(self.shapes)]
        return hashlib.sha256(canonical([self.model_type, rows]).encode()).hexdigest()


@dataclass(frozen=True)
class Origin:
    """Who decided, and on what.

    Attributes:
        method: The pruner's name.
        config: The pruner's fields.
        architecture: Hash of the model type and the stored names and shapes before the stage.
        weights: Hash of the weights that the decision was made on.
        before: What `architecture` is the hash of; None in a plan read from disk after which every tensor
            has the shape it had, or that an earlier version wrote.
    """

    method: str
    config: Mapping[str, Any]
    architecture: str
    weights: str
    before: Architecture | None = None
