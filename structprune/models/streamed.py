"""Opening a model folder: whole in memory, or as a skeleton whose parts are read from the files when needed.

Both ways use the same strict reader and name conversion, so that a streamed and a resident run see the same
weights. transformers never reads a weight file here, and no code of the folder runs unless it is trusted.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from structprune.machine import give_back_memory
from structprune.models import agreement
from structprune.models.arch import block_prefixes
from structprune.models.edited_reader import Reader
from structprune.models.names import Names
from structprune.models.opening import DTYPES, Opening
from structprune.models.remembered import remembered
from structprune.models.skeleton import build_skeleton, open_config, stored_dtype
from structprune.storage.reader import CheckpointReader
from structprune.storage.stored_config import check_sizes


class StreamedModel:
    """A model whose parameters are on the meta device until a part of it is filled from the checkpoint.

    Args:
        skeleton: The module tree: parameters on the meta device, buffers real.
        reader: The checkpoint.
        names: How its tensors are called in the files.
        dtype: Floating-point dtype of filled parameters.
        device: Where filled parameters are put.

    Attributes:
        config: The model's config.
        blocks: Paths of the decoder blocks, first to last.
    """

    def __init__(
        self,
        skeleton: PreTrainedModel,
        reader: Reader,
        names: Names,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.dtype, self.device = dtype, device
        self._take(skeleton, reader, names)

    def _take(self, skeleton: PreTrainedModel, reader: Reader, names: Names) -> None:
        self.skeleton, self.reader, self.names = skeleton, reader, names
        self.config: PreTrainedConfig = skeleton.config
        self.blocks = block_prefixes(skeleton)
        # The empty parameters themselves: putting them back is what frees the memory.
        self._empty: dict[str, Tensor] = dict(skeleton.state_dict(keep_vars=True))
        self._filled: set[str] = set()
        for module in skeleton.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))

    def reopen(self, reader: Reader) -> None:
        """Go on with another checkpoint: what was edited in this one. Nothing of it may be in memory.

        Raises:
            InputError: Its tensors are not those that its configuration describes.
        """
        assert not self._filled
        if reader.shapes == self.reader.shapes and reader.config == self.reader.config:
            self.reader = reader
            return
        # Edits never name code of a folder: this runs some only where opening `self.reader` was trusted to.
        skeleton = build_skeleton(reader, open_config(reader, trust_remote_code=True), self.dtype)
        names = Names(skeleton, reader.shapes)
        agreement.check(reader, names.expected(), names.ignored, names.duplicates)
        self._take(skeleton, reader, names)

    def fill(self, prefix: str) -> None:
        """Read every parameter under a module path ("" for the whole model) that is not there yet.

        Parameters hold the stored values, converted to `dtype`; they need no gradient. Of a mixture of
        experts, one parameter's file tensors at a time are held beside what is already converted.
        """
        self._fill(self._under(prefix))

    def drop(self, prefix: str) -> None:
        """Release every parameter under a module path; a tied one stays alive under its other names."""
        self._drop(self._under(prefix))

    @contextmanager
    def resident(self, prefix: str) -> Iterator[nn.Module]:
        """Hold the parameters under a module path for the length of a `with`; what was there before stays."""
        with self._held(self._under(prefix)):
            yield self.skeleton.get_submodule(prefix)

    @contextmanager
    def outside(self, *, head: bool = True, embeddings: bool = True) -> Iterator[None]:
        """Hold what is outside the blocks for the length of a `with`: norms, positions, a vision tower.

        Args:
            head: Hold the head.
            embeddings: Hold the token embeddings; a head that is tied to them is held by its own name.
        """
        with self._held(self._outside(head=head, embeddings=embeddings)):
            yield

    @contextmanager
    def _held(self, wanted: Iterable[str]) -> Iterator[None]:
        new = [name for name in wanted if name not in self._filled]
        try:
            self._fill(new)
            yield
        finally:
            self._drop(new)

    def _under(self, prefix: str) -> list[str]:
        return [name for name in self._empty if not prefix or name.startswith(f"{prefix}.")]

    def _outside(self, *, head: bool, embeddings: bool) -> list[str]:
        base = "" if head else f"{self.skeleton.base_model_prefix}."
        skipped = [f"{prefix}." for prefix in self.blocks]
        if not embeddings:
            tokens = self.skeleton.get_input_embeddings()
            skipped += [f"{name}." for name, module in self.skeleton.named_modules() if module is tokens]
        return [name for name in self._empty if name.startswith(base) and not name.startswith(tuple(skipped))]

    def _fill(self, wanted: Iterable[str]) -> None:
        new = [name for name in wanted if name not in self._filled]
        alone = []
        for name in new:
            there = next((twin for twin in self.names.twins(name) if twin in self._filled), None)
            if there is None:
                alone.append(name)
            else:
                self._put(name, self.skeleton.get_parameter(there))
        for name, tensor in self.names.load(alone, self.reader.read):
            self._put_all(name, tensor, set(alone))

    def _put_all(self, name: str, tensor: Tensor, wanted: Collection[str]) -> None:
        value = tensor.to(self.device, self.dtype_of(name, tensor))
        if isinstance(self._empty[name], nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        for twin in self.names.twins(name):
            if twin in wanted:
                self._put(twin, value)

    def _put(self, name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        setattr(self.skeleton.get_submodule(path), leaf, value)
        self._filled.add(name)

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            self._put(name, self._empty[name])
            self._filled.discard(name)
        give_back_memory()

    def dtype_of(self, name: str, tensor: Tensor) -> torch.dtype:
        """Return what a stored tensor becomes in memory.

        Args:
            name: Its state-dict name.
            tensor: As it is stored.
        """
        if not tensor.is_floating_point():
            return tensor.dtype
        # The same exceptions that transformers makes: some routers and norms overflow or lose their order.
        exempt = (
            set(self.skeleton._keep_in_fp32_modules_strict or ()) if self.dtype != torch.float32 else set()
        )
        if self.dtype == torch.float16:
            exempt |= set(self.skeleton._keep_in_fp32_modules or ())
        kept = any(re.search(pattern.replace("*", ".*"), name) for pattern in exempt)
        return torch.float32 if kept else self.dtype


Batch = dict[str, Tensor]
Model = PreTrainedModel | StreamedModel


def open_model(path: Path, opening: Opening = Opening()) -> Model:
    """Open a model folder in eval mode, after checking files and config against each other.

    Args:
        path: A folder in the Hugging Face layout with safetensors weights.
        opening: How; streamed, the model is a `StreamedModel` that holds no weights yet, otherwise a whole
            `PreTrainedModel`.

    Raises:
        InputError: The folder is damaged or contradicts itself, its model type is unknown, or it needs
            its own code and is not trusted.
    """
    return build_model(open_reader(path, opening), opening)


def open_skeleton(path: Path, opening: Opening = Opening()) -> StreamedModel:
    """Open a model folder without reading a weight, on the CPU; errors are those of `open_model`."""
    model = open_model(path, replace(opening, stream=True, device="cpu"))
    assert isinstance(model, StreamedModel)
    return model


def open_reader(path: Path, opening: Opening) -> CheckpointReader:
    """Open the files of a model folder; errors are those of `CheckpointReader`."""
    return CheckpointReader(
        path,
        allow_external_symlinks=opening.allow_external_symlinks,
        strict=opening.strict,
        allow_nonfinite=opening.allow_nonfinite,
    )


def build_model(reader: Reader, opening: Opening) -> Model:
    """Return the model of files that are open already; all else is as for `open_model`."""
    opening = opening.resolve(reader.folder, reader.nbytes)
    if opening.stream:
        give_back_memory()
    check_sizes(reader.config, reader.tensors, reader.folder / "config.json")
    config = open_config(reader, opening.trust_remote_code)
    kept = stored_dtype(reader) if opening.dtype == "auto" else DTYPES[opening.dtype]
    skeleton = build_skeleton(reader, config, kept)
    names = Names(skeleton, reader.shapes)
    agreement.check(reader, names.expected(), names.ignored, names.duplicates, strict=opening.strict)
    model = StreamedModel(skeleton, reader, names, dtype=kept, device=torch.device(opening.device))
    if opening.stream:
        return model
    model.fill("")
    notes = remembered(skeleton)
    notes.names = names
    notes.stored = reader.layout
    for parameter in skeleton.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return skeleton
