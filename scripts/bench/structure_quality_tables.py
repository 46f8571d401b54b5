"""The tables and the plots of `structure_quality.py`, from its files, one per model."""

from dataclasses import dataclass, field
from typing import Any


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
