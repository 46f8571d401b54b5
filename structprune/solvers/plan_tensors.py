"""From the solutions of a block's matrices to the tensors of a plan: the files' names, layouts and dtypes."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from structprune.calibration.collect import Collected
from structprune.models.arch import Linear
from structprune.models.factored import part_names
from structprune.models.names import Names
from structprune.solvers.solution import Solution

logger = logging.getLogger(__name__)

Solved = Sequence[tuple[Linear, Solution]]


def record(solved: Solved, names: Names) -> dict[str, Tensor]:
    """Return what the solutions of a block decide, by plan key; what changes nothing is left out.

    Args:
        solved: Linears of one block, each with its solution.
        names: The model's names.
    """
    plan: dict[str, Tensor] = {}
    for linear, solution in solved:
        if solution.factors is None:
            continue
        for part, name in part_names(names.stored_of[linear.name][0]).items():
            value: Tensor = getattr(solution.factors, part.partition(".")[0])
            plan[f"{name}:factor"] = value.to(linear.weight.dtype).contiguous()
            if part == "core.weight":
                plan[f"{name}:mask"] = solution.mask
    solved = [pair for pair in solved if pair[1].factors is None]
    for name, mask in _stored(_whole("mask", solved), names):
        if not bool(mask.all()):
            plan[f"{name}:mask"] = mask
    values = _whole("weight", solved)
    before = dict(_stored({one.name: one.whole for one, _ in solved if one.name in values}, names))
    for name, value in _stored(values, names):
        if not torch.equal(value, before[name]):
            plan[f"{name}:value"] = value
    plan |= {f"{name}:score": score for name, score in _stored(_whole("score", solved), names)}
    return plan


def told(found: Mapping[str, Solution], collected: Collected) -> dict[str, Any]:
    """Return what a plan says of a block: what left, what was measured, and which experts saw few tokens."""
    facts: dict[str, Any] = {
        "removed": {label: int(one.mask.numel() - one.mask.sum()) for label, one in found.items()}
    }
    if measured := {label: dict(one.facts) for label, one in found.items() if one.facts}:
        facts["matrices"] = measured
    if collected.scarce:
        facts["scarce"] = dict(collected.scarce)
    if unseen := [label for label, tokens in collected.scarce.items() if tokens == 0]:
        logger.warning("%s: no calibration token reached it", ", ".join(unseen))
        facts["unseen"] = unseen
    return facts


def _whole(what: str, solved: Solved) -> dict[str, Tensor]:
    """Put parameters together, by state-dict name; experts that are not decided stay as they are."""
    found: dict[str, Tensor] = {}
    for linear, solution in solved:
        part: Tensor | None = getattr(solution, what)
        if part is None:
            continue
        if linear.name not in found:
            found[linear.name] = _undecided(what, linear.whole)
        linear.view(found[linear.name]).copy_(part)
    return found


def _undecided(what: str, parameter: Tensor) -> Tensor:
    if what == "mask":
        return torch.ones_like(parameter, dtype=torch.bool)
    return parameter.clone() if what == "weight" else torch.zeros_like(parameter, dtype=torch.float32)


def _stored(tensors: Mapping[str, Tensor], names: Names) -> Iterator[tuple[str, Tensor]]:
    for key, value in tensors.items():
        for name, part in names.to_stored({key: value}).items():
            yield name, part.contiguous()
