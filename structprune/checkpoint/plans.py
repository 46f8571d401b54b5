"""The plans in a folder: those of a pruned model, in the order in which they were applied."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from structprune.checkpoint.integrity import intact_manifest
from structprune.errors import InputError
from structprune.models.members import new_names
from structprune.plan.block import Read
from structprune.plan.key import WRITTEN
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
    # Without a need for them the weights may be out of reach.
    if (folder / PLANS).is_dir() and any(block.referred for plan in plans for block in plan.blocks):
        reader = CheckpointReader(folder)
        for number, plan in enumerate(plans):
            plan.read_from(_read_through(plans[number:], reader))
    return plans


def refer_plans(plans: Path, folder: Path) -> None:
    """Leave to the saved model what its weights hold anyway; nothing is then kept twice.

    Args:
        plans: The folder of plans.
        folder: The saved model, complete.
    """
    reader = CheckpointReader(folder)
    found = [Plan.load(path) for path in sorted(path.parent for path in plans.glob("*/plan.json"))]
    for number, plan in enumerate(found):
        read = _read_through(found[number:], reader)
        for block in plan.blocks:
            block.refer(read)


def _read_through(plans: Sequence[Plan], reader: CheckpointReader) -> Read:
    """Return what reads the files by the names that the first of some stages knows, numbered lists or not."""
    known = {key.name for key in plans[0] if key.edit in WRITTEN}
    called = dict(zip(known, known, strict=True))
    for plan in plans:
        after = new_names(called.values(), plan)
        called = {name: after[now] for name, now in called.items() if now in after}

    def read(name: str) -> Tensor | None:
        now = called.get(name)
        return reader.read(now) if now in reader.tensors else None

    return read


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

    The goal is "unit", "asked" and "reachable", the fraction that whole units allow; with "while_running",
    what is left in all units, where the saving exists only while structprune runs the model. Odd are
    experts that no token reached ("unseen") or few did ("scarce"), linears whose sizes did not fit
    ("left_dense"), and how what is stored differs from what one would expect ("note").
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
        if any(key.kind == "tokens" for key in plan):
            row |= {key: plan.facts[key] for key in ("unit", "asked") if key in plan.facts}
            row["while_running"] = plan.facts
        rows.append(row | {key: value for key, value in odd.items() if value})
    return rows
