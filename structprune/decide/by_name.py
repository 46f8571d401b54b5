"""Choices between groups of keys, of which a recipe may write the name alone."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ByName:
    """Reads a name alone as the group of that name, with its defaults; one name as no choice at all.

    Attributes:
        nothing: What a recipe calls no choice at all (None).
    """

    nothing: str

    def __call__(self, value: object) -> object:
        """Return what was written as pydantic reads it."""
        if value == self.nothing:
            return None
        return {"name": value} if isinstance(value, str) else value
