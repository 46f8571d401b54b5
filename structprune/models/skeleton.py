"""The module tree that a checkpoint's configuration describes, before any weight is read.

No code of the folder runs unless it is trusted.
"""

import logging
from collections import Counter
from contextlib import nullcontext
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
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
from transformers.initialization import no_init_weights

from structprune.errors import InputError
from structprune.models import factored, native
from structprune.models.config_patch import patch_config
from structprune.models.edited_reader import Reader
from structprune.models.shipped import own_config
from structprune.storage.reader import refusal_of_code
from structprune.storage.stored_config import has_custom_code
from structprune.storage.strict_json import read_json

CONFIG_HINT = "mend this key of config.json, or fetch the model again"

logger = logging.getLogger(__name__)

GENERATION_LIMIT_BYTES = 1 << 20  # a generation_config.json is a page of text; a larger one is not one


# What transformers raises of values that it does not expect: it checks some of them, and computes with all.
CONFIG_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, RuntimeError),
    *(NotImplementedError, ImportError, StrictDataclassError),
)


def open_config(reader: Reader, trust_remote_code: bool) -> PreTrainedConfig:
    """Return the config of a checkpoint.

    Args:
        reader: The checkpoint.
        trust_remote_code: Run a config class that the folder brings along.

    Raises:
        InputError: It contradicts itself, its model type is unknown, or it needs code and is not trusted.
    """
    where = reader.folder / "config.json"
    own, custom = own_config(reader.config), _needs_code(reader)
    if custom and not trust_remote_code:
        raise refusal_of_code(reader.folder)
    model_type = str(own.get("model_type"))
    if not custom and model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{where}: model_type {model_type!r} is not known to the installed transformers",
            hint="check model_type in config.json, or install a release of transformers that knows it",
        )
    try:
        if custom:
            config: Any = AutoConfig.from_pretrained(reader.folder, trust_remote_code=True)
            patch_config(config, reader.patch)
        else:
            config = CONFIG_MAPPING[model_type].from_dict(own)
    except CONFIG_ERRORS as error:
        raise InputError(f"{where}: {_one_line(error)}", hint=CONFIG_HINT) from error
    assert isinstance(config, PreTrainedConfig)
    config.name_or_path = str(reader.folder)
    return config


def _needs_code(reader: Reader) -> bool:
    """Tell whether a model needs code that is shipped with it; ours is never needed here."""
    return has_custom_code(own_config(reader.config))


def task_of(config: PreTrainedConfig) -> Literal["text-generation", "image-text-to-text"]:
    """Return what a model is for, as hubs call it; which class opens it hangs on that."""
    vision = config.get_text_config() is not config and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return "image-text-to-text" if vision else "text-generation"


def build_skeleton(reader: Reader, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the module tree of a config, in eval mode: parameters on the meta device, buffers real.

    Args:
        reader: The checkpoint, for what stands beside the config.
        config: As `open_config` returned it.
        dtype: Of the parameters.

    Raises:
        InputError: No causal language model can be built of it.
    """
    vision = task_of(config) == "image-text-to-text"
    custom = _needs_code(reader)
    if not (vision or custom or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise InputError(
            f"{reader.folder / 'config.json'}: model_type {config.model_type!r} is no causal language model",
            hint="only models that continue text are pruned; give one of those",
        )
    factory: Any = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    try:
        # Buffers stay real: rotary tables and the like are computed, not stored. To draw values for
        # parameters without memory takes half of the time; code of others may make its buffers there.
        undrawn = nullcontext() if custom else no_init_weights()
        with init_empty_weights(include_buffers=False), undrawn:
            skeleton: PreTrainedModel = factory.from_config(config, dtype=dtype, trust_remote_code=custom)
    except CONFIG_ERRORS as error:
        raise InputError(f"{reader.folder / 'config.json'}: {_one_line(error)}", hint=CONFIG_HINT) from error
    # Again, because moving parameters to the meta device one by one has untied them.
    skeleton.tie_weights()
    native.build(skeleton, reader.config, str(reader.folder / "config.json"))
    factored.build(skeleton, reader.config, str(reader.folder / "config.json"))
    file = reader.folder / "generation_config.json"
    if skeleton.can_generate() and file.exists():
        try:
            generation = GenerationConfig.from_dict(
                read_json(file, limit_bytes=GENERATION_LIMIT_BYTES, root=reader.root)
            )
        except CONFIG_ERRORS as error:
            raise InputError(
                f"{file}: {_one_line(error)}", hint="mend the file, or remove it: generation works without"
            ) from error
        skeleton.generation_config = generation
    module: nn.Module = skeleton
    module.eval()
    return skeleton


def stored_dtype(reader: Reader) -> torch.dtype:
    """Return the floating-point dtype that most stored elements have; warn when there are several."""
    elements: Counter[torch.dtype] = Counter()
    for info in reader.tensors.values():
        if info.dtype.is_floating_point:
            elements[info.dtype] += torch.Size(info.shape).numel()
    if not elements:
        raise InputError(
            f"{reader.folder}: no floating-point weights were found",
            hint="the weights are missing or stored as integers: use the original model",
        )
    dtype = elements.most_common(1)[0][0]
    if len(elements) > 1:
        logger.warning("%s: computing in %s, the dtype of most weights", reader.folder, dtype)
    return dtype


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
