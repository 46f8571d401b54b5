"""What structprune keeps in mind about a model in memory, on the model itself."""

from typing import Self

from structprune.models.names import Names

_ATTRIBUTE = "_structprune"


class Remembered:
    """Notes on one model.

    Attributes:
        names: Its names in the files it was opened from, once they are known.
        plans: Ids of the plans that were carried out on it, in order.
    """

    def __init__(self, plans: list[str] | None = None) -> None:
        self.names: Names | None = None
        self.plans: list[str] = plans or []

    def __reduce__(self) -> tuple[type[Self], tuple[list[str]]]:
        """Copy the plans only: a copied model finds its names anew."""
        return type(self), (list(self.plans),)


def remembered(model: object) -> Remembered:
    """Return the notes on a model, which are made at the first call."""
    notes = vars(model).get(_ATTRIBUTE)
    if notes is None:
        notes = Remembered()
        object.__setattr__(model, _ATTRIBUTE, notes)
    assert isinstance(notes, Remembered)
    return notes
