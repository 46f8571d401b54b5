"""Which weights stay removed while a model recovers, and the proof that they did."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from structprune.errors import InputError, QualityError, VerificationError
from structprune.models.arch import arch_of, blocks, linears
from structprune.models.identity import names_of
from structprune.models.names import Names
from structprune.plan.key import Key
from structprune.plan.plan import Plan

OTHER_MODEL = "the masks belong to another model: give the one that was pruned with them"

log = logging.getLogger(__name__)


def trained_names(model: PreTrainedModel) -> list[str]:
    """Return the parameter of every linear of the blocks, sorted; fused experts are one.

    Args:
        model: Its parameters may be on the meta device.
    """
    arch = arch_of(model)
    return sorted({linear.name for prefix, block in blocks(model) for linear in linears(prefix, block, arch)})


def nonzero_masks(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return `weight != 0` for every linear of the blocks, by parameter name, in the parameter's layout.

    Args:
        model: In memory; fused experts are one mask, shape [experts, out, in].
    """
    return {name: model.get_parameter(name).detach() != 0 for name in trained_names(model)}


def masks_of(model: PreTrainedModel, plans: Sequence[Plan]) -> dict[str, Tensor]:
    """Return what is kept of every linear of the blocks, by parameter name, in the parameter's layout.

    What the plans removed is removed, unless a later one gave the same tensor new values and a mask of its
    own; beyond them, and of a model without plans, what is zero stays zero.

    Args:
        model: In memory.
        plans: What was decided on it.
    """
    names = names_of(model)
    return {
        name: mask_of(name, model.get_parameter(name).detach(), names, plans) for name in trained_names(model)
    }


def mask_of(name: str, weight: Tensor, names: Names, plans: Sequence[Plan]) -> Tensor:
    """Return what is kept of one weight, in its own layout; see `masks_of`.

    Args:
        name: The parameter.
        weight: As its file holds it.
        names: The model's.
        plans: What was decided on it.
    """
    parts = names.to_stored({name: torch.ones(weight.shape, dtype=torch.bool)})
    for plan in plans:
        for part, kept in parts.items():
            mask = plan.get(Key(part, "mask"))
            if mask is not None:
                parts[part] = mask if Key(part, "value") in plan else kept & mask
    return (weight != 0) & names.to_module(parts)[name].to(weight.device)


@torch.no_grad()
def reapply(model: PreTrainedModel, masks: Mapping[str, Tensor]) -> None:
    """Set to zero what the masks remove; nothing changes in a model that was pruned with them.

    Args:
        model: Changed in place.
        masks: By parameter name, in the parameter's layout, True = kept.

    Raises:
        InputError: A mask names no parameter, or has another shape; the model is then as it was.
    """
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise InputError(
                f"there is a mask for {name}, which {type(model).__name__} does not have", hint=OTHER_MODEL
            )
        if parameters[name].shape != mask.shape:
            found, expected = list(mask.shape), list(parameters[name].shape)
            raise InputError(f"the mask of {name} has shape {found}, the tensor {expected}", hint=OTHER_MODEL)
    for name, mask in masks.items():
        remove(name, parameters[name], mask)


@torch.no_grad()
def remove(name: str, weight: Tensor, mask: Tensor) -> None:
    """Set to zero what a mask removes of one weight, in place; say so where something was not zero.

    Args:
        name: The parameter, for the warning.
        weight: Any shape.
        mask: The same shape, True = kept.
    """
    removed = ~mask.to(weight.device)
    alive = int((weight[removed] != 0).sum())
    if alive:
        log.warning("%s: %d weights that the mask removes were not zero; they are now", name, alive)
        weight.masked_fill_(removed, 0.0)


def zeros(weight: Tensor) -> int:
    """Return how many elements are exactly zero."""
    return int((weight == 0).sum())


def check_merged(name: str, weight: Tensor, expected: int) -> None:
    """Hold what recovery promises about a tensor that it changed.

    Args:
        name: The tensor, for the message.
        weight: After merging.
        expected: Its zeros before.

    Raises:
        QualityError: A number is not finite.
        VerificationError: There are more or fewer zeros.
    """
    if not bool(weight.isfinite().all()):
        raise QualityError(
            f"{name} holds numbers that are not finite after merging", hint="use a smaller learning rate"
        )
    if zeros(weight) != expected:
        raise VerificationError(
            f"{name} has {zeros(weight)} zeros after merging, expected {expected}",
            hint="nothing was published; report it with `structprune env`",
        )
