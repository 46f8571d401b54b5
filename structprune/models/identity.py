"""Which model this is: its names in the files, the hashes that tie a plan to it, the plans it carries."""

import hashlib
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from structprune.errors import InputError
from structprune.models import edit
from structprune.models.arch import Linear, blocks
from structprune.models.names import Names
from structprune.models.remembered import remembered
from structprune.models.streamed import Model, StreamedModel
from structprune.plan.plan import Plan, architecture_hash
from structprune.storage.header import TensorInfo
from structprune.storage.scan import combine
from structprune.storage.tensor_file import bytes_of


def skeleton(model: Model) -> PreTrainedModel:
    """Return the module tree, whose parameters may be on the meta device."""
    return model.skeleton if isinstance(model, StreamedModel) else model


def names_of(model: Model) -> Names:
    """Return the model's names in the files it was opened from, or in those it would be saved to."""
    if isinstance(model, StreamedModel):
        return model.names
    notes = remembered(model)
    if notes.names is None:
        notes.names = Names(model)
    return notes.names


def architecture_of(model: Model) -> str:
    """Return the hash of the model type and the stored names and shapes."""
    return architecture_hash(model.config.model_type, names_of(model).expected())


def weights_of(model: Model) -> str:
    """Return the hash of all weights, the one that a scan of the model's files gives."""
    if isinstance(model, StreamedModel):
        return model.reader.scan(model.names.ignored).weights
    names = names_of(model)
    state = model.state_dict()
    found: dict[str, tuple[TensorInfo, str]] = {}
    for name in names.stored_of:
        for stored, value in names.to_stored({name: state[name]}).items():
            tensor = value.detach().cpu().contiguous()
            info = TensorInfo(stored, tensor.dtype, tuple(tensor.shape), "", 0, 0)
            found[stored] = info, hashlib.sha256(bytes_of(tensor, stored)).hexdigest()
    return combine(found[name] for name in sorted(found))


def applied(model: Model) -> list[str]:
    """Return the ids of the plans that were carried out on a model, in order."""
    return remembered(model).plans


@torch.no_grad()
def carry_out(model: Model, plan: Plan) -> None:
    """Carry a plan out on a model in place, block by block; the same plan twice is the plan once.

    Raises:
        InputError: The plan belongs to another architecture; the model is left as it was.
    """
    if plan.id in applied(model):
        return
    if plan.architecture != architecture_of(model):
        raise InputError(
            f"the plan of {plan.method!r} is for another architecture than this {model.config.model_type}",
            hint="a plan fits only models with the same tensor names and shapes",
        )
    names = names_of(model)
    if isinstance(model, StreamedModel):
        model.edits.append(lambda prefix, block: edit.apply(prefix, block, plan, names))
    else:
        undone = [edit.apply(prefix, block, plan, names) for prefix, block in blocks(model)]
        if any(undone):
            remembered(model).names = None  # replaced modules have tensors of other names
    applied(model).append(plan.id)


def stored_names(names: Names, chosen: Sequence[Linear]) -> list[str]:
    """Return the stored tensors that linears are made of, sorted; of a mixture the given experts' own."""
    parts = {part for linear in chosen if linear.expert is None for part in names.stored_of[linear.name]}
    fused: dict[str, list[Linear]] = {}
    for linear in chosen:
        if linear.expert is not None:
            fused.setdefault(linear.name, []).append(linear)
    for name, experts in fused.items():
        # The conversion itself tells which of its parts an expert ends up in.
        marked = torch.zeros(experts[0].module.get_parameter(experts[0].parameter).shape, dtype=torch.bool)
        for linear in experts:
            linear.view(marked).fill_(True)
        parts |= {part for part, mark in names.to_stored({name: marked}).items() if bool(mark.any())}
    return sorted(parts)
