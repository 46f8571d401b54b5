"""The plans in a folder: those of a pruned model, in the order in which they were applied."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from structprune.checkpoint.integrity import intact_manifest
from structprune.errors import InputError
from structprune.plan.plan import Plan
from structprune.storage.reader import CheckpointReader

PLANS = Path("structprune") / "plans"


def read_plans(folder: Path) -> list[Plan]:
    """Read a plan, or several in order, from a plan's folder, a folder of plans, or an output folder.

    Raises:
        InputError: There is none, or one is damaged, or the output folder is no longer what was written.
    """
    intact_manifest(folder)
    plans = plans_of(folder)
    if not plans:
        raise InputError(f"{folder}: holds no plan", hint="give a folder that `structprune prune` wrote")
    if (folder / PLANS).is_dir():
        reader = CheckpointReader(folder)
        for plan in plans:
            plan.read_from(reader.read)
    return plans


def refer_plans(plans: Path, folder: Path) -> None:
    """Leave to the saved model what its weights hold anyway; nothing is then kept twice.

    Args:
        plans: The folder of plans.
        folder: The saved model, complete.
    """
    reader = CheckpointReader(folder)
    for path in sorted(path.parent for path in plans.glob("*/plan.json")):
        for block in Plan.load(path).blocks:
            block.refer(reader.read)


def plans_of(folder: Path) -> list[Plan]:
    """Return the plans in a folder, none where it holds none."""
    root = folder / PLANS if (folder / PLANS).is_dir() else folder
    found = (
        [root] if (root / "plan.json").is_file() else sorted(path.parent for path in root.glob("*/plan.json"))
    )
    return [Plan.load(path) for path in found]


def folder_of(number: int, method: str) -> str:
    """Return the name of the folder of a run's plan; stages count from 1."""
    return f"{number:02d}-{method}"


def save_plans(plans: Sequence[Plan], folder: Path) -> None:
    """Write plans into a folder, each into one of its own."""
    for number, plan in enumerate(plans, start=1):
        plan.save(folder / folder_of(number, plan.method))


def stages(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Return what a report says about each plan: folder, method, config, id, its goal, and what is odd.

    The goal is "unit", "asked" and "reachable", the fraction that whole units allow. Odd are experts that no
    token reached ("unseen") or few did ("scarce"), linears whose sizes did not fit ("left_dense"), and how
    what is stored differs from what one would expect ("note").
    """
    rows = []
    for number, plan in enumerate(plans, start=1):
        facts = [block.facts for block in plan.blocks]
        odd: dict[str, Any] = {
            "unseen": [label for found in facts for label in found.get("unseen", [])],
            "scarce": {label: tokens for found in facts for label, tokens in found.get("scarce", {}).items()},
            "left_dense": plan.facts.get("left_dense"),
            "note": plan.facts.get("note"),
        }
        row: dict[str, Any] = {
            "folder": folder_of(number, plan.method),
            "method": plan.method,
            "config": plan.config,
            "plan": plan.id,
        }
        if (promised := plan.promises) is not None:
            reachable = promised.removed / promised.of if promised.of else 0.0
            row |= {"unit": promised.unit, "asked": promised.asked, "reachable": reachable}
        rows.append(row | {key: value for key, value in odd.items() if value})
    return rows
