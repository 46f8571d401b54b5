"""Which model this is: its names in the files, the hashes that tie a plan to it, the plans it carries."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from structprune.models.arch import Linear
from structprune.models.names import Names
from structprune.models.remembered import remembered
from structprune.models.streamed import Model, StreamedModel
from structprune.models.tensor_edit import Layout
from structprune.plan.origin import Architecture
from structprune.storage.reader import CheckpointReader
from structprune.storage.scan import combine
from structprune.storage.tensor_file import Entry, hash_of


def skeleton(model: Model) -> PreTrainedModel:
    """Return the module tree, whose parameters may be on the meta device."""
    return model.skeleton if isinstance(model, StreamedModel) else model


def names_of(model: Model) -> Names:
    """Return the model's names in the files it was opened from, or in those it would be saved to."""
    if isinstance(model, StreamedModel):
        return model.names
    notes = remembered(model)
    if notes.names is None:
        shapes = None
        if notes.stored is not None:
            shapes = {name: shape for entries in notes.stored.values() for name, _, shape in entries}
        notes.names = Names(model, shapes)
    return notes.names


def describe(model: Model) -> Architecture:
    """Return the model type, and the names and shapes of the stored tensors."""
    return Architecture(model_type=model.config.model_type, shapes=names_of(model).expected())


def architecture_of(model: Model) -> str:
    """Return the hash of the model type and the stored names and shapes."""
    return describe(model).hash


def weights_of(model: Model) -> str:
    """Return the hash of all weights, the one that a scan of the model's files gives."""
    if isinstance(model, StreamedModel):
        if isinstance(model.reader, CheckpointReader):
            return model.reader.scan(model.names.ignored).weights
        return combine(dict(_hashed(name, model.reader.read(name)) for name in model.reader.tensors))
    names, state = names_of(model), model.state_dict()
    stored = (names.to_stored({name: state[name]}) for name in names.stored_of)
    return combine(dict(_hashed(name, value) for values in stored for name, value in values.items()))


def applied(model: Model) -> list[str]:
    """Return the ids of the plans that were carried out on a model, in order."""
    return remembered(model).plans


def zeros_found(model: Model, names: Iterable[str]) -> int:
    """Return how many zeros some stored tensors had when the model was opened; 0 where nobody counted."""
    zeros = remembered(model).zeros
    return sum(zeros.get(name, 0) for name in names)


def stored_layout(model: Model) -> Layout:
    """Return what the model's files hold; of a model without files, what they would, in one of no name."""
    if isinstance(model, StreamedModel):
        return model.reader.layout
    notes = remembered(model)
    if notes.stored is None:
        names, state = names_of(model), model.state_dict()
        expected = names.expected().items()
        notes.stored = {"": [(name, state[names.module_of[name]].dtype, shape) for name, shape in expected]}
    return notes.stored


def remember_stored(model: PreTrainedModel, layout: Layout) -> None:
    """Note what the model's files would hold from now on; its names are found anew."""
    notes = remembered(model)
    notes.stored, notes.names = layout, None


def stored_dtypes(model: Model) -> dict[str, torch.dtype]:
    """Return the dtype of every stored tensor, which need not be the one that the model computes in."""
    return {name: dtype for entries in stored_layout(model).values() for name, dtype, _ in entries}


def names_of_matrix(names: Names, linear: Linear) -> tuple[str, ...]:
    """Return the stored tensors that one matrix is made of; of an expert that is stored apart, its own."""
    return tuple(stored_names(names, [linear]))


def stored_names(names: Names, chosen: Sequence[Linear]) -> list[str]:
    """Return the stored tensors that linears are made of, sorted; of a mixture the given experts' own."""
    return sorted({part for linear in chosen for part in names.stored_of_linear(linear.name, linear.expert)})


def _hashed(name: str, value: Tensor) -> tuple[Entry, str]:
    return (name, value.dtype, tuple(value.shape)), hash_of(value, name)
