"""The rows that `quality.py` measures, and their cells found again in a file."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from cells import Cell

SPARSITIES = ("0.3", "0.5", "0.6", "0.7", "2:4", "4:8")
# Where whole units leave, by the share of the parameters of all kinds of unit, whichever of them a method
# removes: other columns, which only `UNITS` have.
SMALLER = {"20% smaller": 0.2, "50% smaller": 0.5}
EQUAL_BYTES = "sparsegpt, armor's bytes"
# By row: the method, and the fields that are not its defaults. The first rows are each from one paper (OWL
# is one), those with a plus from several. N:M leaves a budget nothing to do: it is left out there.
SINGLE = ("random", "magnitude", "wanda", "gblm", "ria", "nowag", "sparsegpt", "thanos", "alps")
ROWS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in SINGLE} | {
    "owl (wanda)": ("wanda", {"budget": "owl"}),
    "owl (sparsegpt)": ("sparsegpt", {"budget": "owl"}),
    "wanda + least_squares": ("wanda", {"repair": "least_squares"}),
    "wanda + owl + least_squares": ("wanda", {"budget": "owl", "repair": "least_squares"}),
    "alps + owl": ("alps", {"budget": "owl"}),
    "armor": ("armor", {}),
    "armor, gram": ("armor", {"proxy": "gram"}),
    EQUAL_BYTES: ("sparsegpt", {}),
}
# The best composition of structure methods on the real model, its score alone, and chance, of all kinds.
ALL_UNITS = "random_units"
UNITS: dict[str, tuple[str, dict[str, Any]]] = {
    ALL_UNITS: (ALL_UNITS, {}),
    "cfsp": ("cfsp", {}),
    "cfsp + least_squares": ("cfsp", {"repair": "least_squares"}),
}


def cells_at(cells: Sequence[Cell], row: str, sparsity: str) -> dict[int, Cell]:
    """Return the cells of a row at a sparsity, by seed."""
    return {cell["seed"]: cell for cell in cells if (cell["row"], cell["sparsity"]) == (row, sparsity)}


def perplexity_of(cells: Sequence[Cell]) -> float:
    """Return the mean perplexity over seeds."""
    return fmean(cell["perplexity"] for cell in cells)
