"""What structprune keeps in mind about a model in memory, on the model itself."""

from collections.abc import Mapping
from typing import Self

from structprune.models.names import Names
from structprune.models.tensor_edit import Layout

_ATTRIBUTE = "_structprune"


class Remembered:
    """Notes on one model.

    Attributes:
        names: Its names in the files it was opened from, once they are known.
        stored: What its files hold, or would hold after what was carried out on it; None where it never had
            files and nothing was carried out.
        plans: Ids of the plans that were carried out on it, in order.
        zeros: Zeros in every stored tensor, where a scan of its files counted them and nothing was carried
            out since.
    """

    def __init__(self, plans: list[str] | None = None, stored: Layout | None = None) -> None:
        self.names: Names | None = None
        self.stored = stored
        self.plans: list[str] = plans or []
        self.zeros: Mapping[str, int] = {}

    def __reduce__(self) -> tuple[type[Self], tuple[list[str], Layout | None]]:
        """Copy all but the names, which hold on to their model: a copied model finds its own."""
        return type(self), (list(self.plans), self.stored)


def remembered(model: object) -> Remembered:
    """Return the notes on a model, which are made at the first call."""
    notes = vars(model).get(_ATTRIBUTE)
    if notes is None:
        notes = Remembered()
        object.__setattr__(model, _ATTRIBUTE, notes)
    assert isinstance(notes, Remembered)
    return notes
