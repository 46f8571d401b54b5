"""Opening a model folder: whole in memory, or as a skeleton whose parts are read from the files when needed.

Both ways use the same strict reader and name conversion, so that a streamed and a resident run see the same
weights. transformers never reads a weight file here, and no code of the folder runs unless it is trusted.
"""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from structprune.errors import InputError, UsageError
from structprune.machine import give_back_memory
from structprune.models import agreement, factored
from structprune.models.arch import block_prefixes
from structprune.models.config_patch import patch_config
from structprune.models.edited_reader import Reader
from structprune.models.names import Names
from structprune.models.remembered import remembered
from structprune.models.shipped import own_config
from structprune.storage.reader import CheckpointReader, refusal_of_code
from structprune.storage.stored_config import has_custom_code
from structprune.storage.strict_json import read_json

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GENERATION_LIMIT_BYTES = 1 << 20  # a generation_config.json is a page of text; a larger one is not one


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
        skeleton = _skeleton(reader, _open_config(reader, trust_remote_code=True), self.dtype)
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
        value = tensor.to(self.device, self._dtype_of(name, tensor))
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

    def _dtype_of(self, name: str, tensor: Tensor) -> torch.dtype:
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


def open_model(
    path: Path,
    *,
    stream: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_external_symlinks: bool = False,
) -> Model:
    """Open a model folder in eval mode, after checking files and config against each other.

    Args:
        path: A folder in the Hugging Face layout with safetensors weights.
        stream: Return a `StreamedModel` that holds no weights yet, not a whole `PreTrainedModel`.
        dtype: "auto" keeps the dtype of the files (the commonest, with a warning, where they mix several);
            or float32, bfloat16, float16.
        device: Where parameters and buffers are put.
        trust_remote_code: Run modelling code that the folder brings along.
        allow_external_symlinks: Accept weight files that are links out of the folder.

    Raises:
        InputError: The folder is damaged or contradicts itself, its model type is unknown, or it needs
            its own code and is not trusted.
        UsageError: `dtype` is none of the above.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known", hint=f"one of: auto, {', '.join(DTYPES)}")
    if stream:
        give_back_memory()
    reader = CheckpointReader(path, allow_external_symlinks=allow_external_symlinks)
    config = _open_config(reader, trust_remote_code)
    kept = _stored_dtype(reader) if dtype == "auto" else DTYPES[dtype]
    skeleton = _skeleton(reader, config, kept)
    names = Names(skeleton, reader.shapes)
    agreement.check(reader, names.expected(), names.ignored, names.duplicates)
    model = StreamedModel(skeleton, reader, names, dtype=kept, device=torch.device(device))
    if stream:
        return model
    model.fill("")
    notes = remembered(skeleton)
    notes.names = names
    notes.stored = reader.layout
    for parameter in skeleton.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return skeleton


def _open_config(reader: Reader, trust_remote_code: bool) -> PreTrainedConfig:
    where = reader.folder / "config.json"
    own, custom = own_config(reader.config), _needs_code(reader)
    if custom and not trust_remote_code:
        raise refusal_of_code(reader.folder)
    model_type = str(own.get("model_type"))
    if not custom and model_type not in CONFIG_MAPPING:
        raise InputError(f"{where}: model_type {model_type!r} is not known to the installed transformers")
    try:
        if custom:
            config: Any = AutoConfig.from_pretrained(reader.folder, trust_remote_code=True)
            patch_config(config, reader.patch)
        else:
            config = CONFIG_MAPPING[model_type].from_dict(own)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise InputError(f"{where}: {_one_line(error)}") from error
    assert isinstance(config, PreTrainedConfig)
    config.name_or_path = str(reader.folder)
    return config


def _needs_code(reader: Reader) -> bool:
    """Tell whether a model needs code that is shipped with it; ours is never needed here."""
    return has_custom_code(own_config(reader.config))


def _skeleton(reader: Reader, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    vision = config.get_text_config() is not config and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    custom = _needs_code(reader)
    if not (vision or custom or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise InputError(
            f"{reader.folder / 'config.json'}: model_type {config.model_type!r} is no causal language model"
        )
    factory: Any = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    try:
        # Buffers stay real: rotary tables and the like are computed, not stored.
        with init_empty_weights(include_buffers=False):
            skeleton: PreTrainedModel = factory.from_config(config, dtype=dtype, trust_remote_code=custom)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise InputError(f"{reader.folder / 'config.json'}: {_one_line(error)}") from error
    # Again, because moving parameters to the meta device one by one has untied them.
    skeleton.tie_weights()
    factored.build(skeleton, reader.config, str(reader.folder / "config.json"))
    file = reader.folder / "generation_config.json"
    if skeleton.can_generate() and file.exists():
        try:
            generation = GenerationConfig.from_dict(
                read_json(file, limit_bytes=GENERATION_LIMIT_BYTES, root=reader.root)
            )
        except (ValueError, TypeError) as error:
            raise InputError(f"{file}: {_one_line(error)}") from error
        skeleton.generation_config = generation
    module: nn.Module = skeleton
    module.eval()
    return skeleton


def _stored_dtype(reader: CheckpointReader) -> torch.dtype:
    """Return the floating-point dtype that most stored elements have; warn when there are several."""
    elements: Counter[torch.dtype] = Counter()
    for info in reader.tensors.values():
        if info.dtype.is_floating_point:
            elements[info.dtype] += torch.Size(info.shape).numel()
    if not elements:
        raise InputError(f"{reader.folder}: no floating-point weights were found")
    dtype = elements.most_common(1)[0][0]
    if len(elements) > 1:
        logger.warning("%s: computing in %s, the dtype of most weights", reader.folder, dtype)
    return dtype


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
