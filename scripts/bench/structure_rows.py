"""The rows that the benches of structure pruners measure, and their cells found again in a file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from cells import Cell

# A row that has this much more of the blocks left is not compared as an equal.
AS_SMALL = 0.02
# What counts as better, in standard errors.
SURE = 2


@dataclass(frozen=True)
class Row:
    """A score with a budget and a repair.

    Attributes:
        method: Its file.
        fields: Those that are not the method's defaults.
        width: Whether key-value groups or channels leave.
        paper: Whether a paper has put it together so.
    """

    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    width: bool = True
    paper: bool = False

    @property
    def composition(self) -> bool:
        """Tell whether it may be chosen: what no paper has put together, and no baseline."""
        return self.width and not self.paper and not self.baseline

    @property
    def baseline(self) -> bool:
        """Tell whether units leave at random."""
        return self.method == "random_units" or self.fields.get("score") == "random"


# Scores of units, each with a budget: the method, its fields, and the repair that its paper has.
SCORES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "random_units": ("random_units", {}, None),
    "magnitude_units": ("magnitude_units", {}, "none"),
    "wanda_sp": ("wanda_sp", {}, "none"),
    "wanda_sp, global": ("wanda_sp", {"budget": "global"}, None),
    "flap": ("flap", {}, "bias"),
    "cfsp": ("cfsp", {}, "none"),
    "cfsp, compat": ("cfsp", {"compat": True}, "none"),
    "llm_pruner, vector": ("llm_pruner", {"score": "vector"}, "none"),
    "llm_pruner, element2": ("llm_pruner", {"score": "element2"}, "none"),
    "llm_pruner, mixed": ("llm_pruner", {"score": "mixed"}, "none"),
    "llm_pruner, element2, global": ("llm_pruner", {"score": "element2", "budget": "global"}, None),
}
REPAIRS = ("none", "bias", "least_squares")
DEPTH = {
    "attention_skip": Row("attention_skip", {"adapter": False, "refit": False}, width=False),
    "attention_skip + adapter + refit": Row("attention_skip", width=False, paper=True),
    "block_drop, random": Row("block_drop", {"score": "random"}, width=False),
    "block_drop, influence": Row("block_drop", width=False, paper=True),
    "block_drop, loss of sub-blocks": Row(
        "block_drop", {"score": "loss", "units": ["attention", "mlp"]}, width=False, paper=True
    ),
}
ROWS: dict[str, Row] = {
    f"{name} + {repair}" if repair != "none" else name: Row(
        method, fields | {"repair": repair}, paper=repair == own
    )
    for name, (method, fields, own) in SCORES.items()
    for repair in REPAIRS
} | DEPTH

# Those that `structure_recovery.py` trains.
TRAINED = (
    "random_units",
    "magnitude_units",
    "wanda_sp",
    "wanda_sp, global + least_squares",
    "flap + bias",
    "flap + least_squares",
    "cfsp",
    "cfsp + least_squares",
    "cfsp, compat",
    "llm_pruner, vector",
    "llm_pruner, mixed",
    "llm_pruner, element2, global + least_squares",
    "attention_skip + adapter + refit",
    "block_drop, influence",
)

Found = dict[tuple[str, float], Cell]


def found_of(kept: Mapping[str, Any]) -> Found:
    """Return cells by row and sparsity, in the order of the rows."""
    cells = {(cell["row"], cell["sparsity"]): cell for cell in kept["cells"]}
    return {key: cells[key] for key in sorted(cells, key=lambda key: ([*ROWS].index(key[0]), key[1]))}


def sparsities_of(found: Found) -> list[float]:
    """Return what was measured, ascending."""
    return sorted({sparsity for _, sparsity in found})


def shown(row: str) -> str:
    """Return how tables call a row."""
    return f"{row} (paper)" if ROWS[row].paper else row


def chosen(found: Found) -> str | None:
    """Return the composition that does best on the text to choose on; none where there was no choice."""
    everywhere = sparsities_of(found)
    means = {
        row: fmean(math.log(found[row, sparsity]["choose"]["kl"]) for sparsity in everywhere)
        for row, one in ROWS.items()
        if one.composition and all((row, sparsity) in found for sparsity in everywhere)
    }
    return min(means, key=means.__getitem__) if len(means) > 1 else None
