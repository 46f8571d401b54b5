"""From what becomes of a block's matrices to the tensors of a plan: the files' names, layouts and dtypes."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from structprune.calibration.collect import BlockSums
from structprune.models.arch import Linear
from structprune.models.factored import part_names
from structprune.models.names import Names
from structprune.plan.key import Key
from structprune.solvers.matrix import PrunedMatrix

logger = logging.getLogger(__name__)

PrunedLinears = Sequence[tuple[Linear, PrunedMatrix]]


def plan_tensors(pruned: PrunedLinears, names: Names, dtypes: Mapping[str, torch.dtype]) -> dict[Key, Tensor]:
    """Return what was decided on a block's matrices, by plan key; what changes nothing is left out.

    New values are rounded to the dtype that their tensor is stored in, whatever was computed in: later blocks
    then see what the files will hold.

    Args:
        pruned: Linears of one block, each with what becomes of it.
        names: The model's names.
        dtypes: Dtype of every stored tensor.
    """
    plan: dict[Key, Tensor] = {}
    for linear, matrix in pruned:
        if matrix.factors is None:
            continue
        whole = names.stored_of[linear.name][0]
        for part, name in part_names(whole).items():
            value: Tensor = getattr(matrix.factors, part.partition(".")[0])
            plan[Key(name, "factor")] = value.to(dtypes[whole]).contiguous()
            if part == "core.weight":
                plan[Key(name, "mask")] = matrix.mask
    pruned = [pair for pair in pruned if pair[1].factors is None]
    kinds = {one.name: dtypes[names.stored_of[one.name][0]] for one, _ in pruned}
    masks = _whole("mask", pruned, dict.fromkeys(kinds, torch.bool))
    for name, mask in _stored(masks, names):
        if not bool(mask.all()):
            plan[Key(name, "mask")] = mask
    values = _whole("weight", pruned, kinds)
    before = dict(_stored({one.name: one.whole for one, _ in pruned if one.name in values}, names))
    for name, value in _stored(values, names):
        if not torch.equal(value, before[name].to(value.dtype)):
            plan[Key(name, "value")] = value
    scores = _whole("score", pruned, dict.fromkeys(kinds, torch.float32))
    return plan | {Key(name, "score"): score for name, score in _stored(scores, names)}


def block_facts(found: Mapping[str, PrunedMatrix], collected: BlockSums) -> dict[str, Any]:
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


def _whole(what: str, pruned: PrunedLinears, kinds: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Put parameters together, by state-dict name; experts that are not decided stay as they are.

    Args:
        what: "mask", "weight" or "score" of a pruned matrix.
        pruned: Linears with what becomes of them.
        kinds: The dtype that each parameter gets.
    """
    found: dict[str, Tensor] = {}
    for linear, matrix in pruned:
        part: Tensor | None = getattr(matrix, what)
        if part is None:
            continue
        if what == "weight":
            # A solver may leave anything where the mask is False, -0.0 included; the files hold 0 there.
            part = part.masked_fill(~matrix.mask, 0)
        if linear.name not in found:
            kind = kinds[linear.name]
            undecided = {"mask": linear.whole.new_ones(1), "score": linear.whole.new_zeros(1)}
            found[linear.name] = undecided.get(what, linear.whole).expand_as(linear.whole).to(kind, copy=True)
        linear.view(found[linear.name]).copy_(part)
    return found


def _stored(tensors: Mapping[str, Tensor], names: Names) -> Iterator[tuple[str, Tensor]]:
    for key, value in tensors.items():
        for name, part in names.to_stored({key: value}).items():
            yield name, part.contiguous()
