"""What a folder carries for plain transformers where no class of theirs can open it: a modelling file.

It holds products and blocks of other sizes, as config.json lists them, and is named there. structprune itself
reads the lists and never runs the file.
"""

import inspect
import json
import pprint
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from structprune.errors import InputError
from structprune.models import factored, modules, native, shapes
from structprune.models.arch import row_of
from structprune.models.config_patch import merge_patch
from structprune.models.shipped import SHIPPED_CLASSES, SHIPPED_TYPE, own_config
from structprune.storage.durable import DurableFile
from structprune.storage.stored_config import MAX_CONFIG_BYTES, without_ignored
from structprune.storage.strict_json import read_json

FILE = f"{SHIPPED_CLASSES[0].partition('.')[0]}.py"
KEYS = (native.CONFIG_KEY, factored.CONFIG_KEY)

# What follows the texts of `structprune/models/modules.py` and `shapes.py` in the file.
TEMPLATE = '''

from transformers import {base}, {config}  # noqa: E402
from transformers.conversion_mapping import (  # noqa: E402
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

BLOCKS = "{blocks}"
PATHS = {paths}

# Weights are stored as those of the dense model are: each expert apart, some under other names.
for name in ("{base}", "{dense}"):
    if get_checkpoint_conversion_mapping(name) is not None:
        register_checkpoint_conversion_mapping(
            "{kind}", get_checkpoint_conversion_mapping(name), overwrite=True
        )
        break


class PrunedConfig({config}):
    """{config} under a type of its own, so that nothing takes the folder for a dense one."""

    model_type = "{kind}"


class PrunedModel({base}):
    """{base} with the sizes and the products that config.json lists."""

    config_class = PrunedConfig

    def __init__(self, config, *args, **kwargs):
        """Build the dense model, then cut its blocks and put products in the place of linears."""
        super().__init__(config, *args, **kwargs)
        blocks = self.get_submodule(BLOCKS) if BLOCKS else ()
        for block, sizes in zip(blocks, getattr(config, "{sizes}", None) or ()):
            resize_block(block, PATHS, sizes)
        for path, (left, right) in (getattr(config, "{products}", None) or {{}}).items():
            linear = self.get_submodule(path)
            self.set_submodule(path, FactoredLinear.like(linear, right, left))

    @classmethod
    def _can_set_experts_implementation(cls):
        # Looked for in the text of a class's file; the experts' is the dense class's.
        return {base}._can_set_experts_implementation()

    @classmethod
    def _can_set_attn_implementation(cls):
        return {base}._can_set_attn_implementation()
'''


def write_config(folder: Path, patch: Mapping[str, Any]) -> dict[str, str]:
    """Change config.json as plans ask for, and write the modelling file where plain transformers needs one.

    Keys that are ignored when it is read (private ones that newer loaders may obey) are not handed on.

    Args:
        folder: The folder under work, its side files copied.
        patch: Keys of config.json with their new values.

    Returns:
        The sha256 of each written file, by file name; none where config.json is fine as it is.
    """
    hashes = {}
    for file, content in patched_files(folder / "config.json", patch).items():
        with DurableFile(folder / file) as output:
            output.write(content)
        hashes[file] = output.sha256
    return hashes


def patched_files(path: Path, patch: Mapping[str, Any]) -> dict[str, bytes]:
    """Return what config.json and the modelling file hold once they are changed, by file name.

    A config.json in which there is nothing to change stays as it is, byte for byte; a modelling file is
    always today's, whichever text an earlier version put there.

    Args:
        path: The config.json before the patch.
        patch: Keys with their new values.
    """
    read = read_json(path, limit_bytes=MAX_CONFIG_BYTES)
    kept = without_ignored(read)
    config = merge_patch(own_config(kept), patch)
    if not needs_code(config):
        return {} if config == read else {"config.json": _encode(config)}
    vision = "ForConditionalGeneration" in config["architectures"][0]
    factory = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    config["model_type"] = f"{SHIPPED_TYPE}{config['model_type']}"
    # The lists come last, as they are long.
    listed = {key: config.pop(key) for key in KEYS if key in config}
    config["auto_map"] = dict(zip(("AutoConfig", factory), SHIPPED_CLASSES, strict=True))
    config |= listed
    changed = {} if config == read else {"config.json": _encode(config)}
    return changed | {FILE: modelling_file(config)}


def needs_code(config: Mapping[str, Any] | PreTrainedConfig) -> bool:
    """Tell whether plain transformers needs the modelling file to open a model with this configuration."""
    found = config if isinstance(config, Mapping) else vars(config)
    return any(found.get(key) for key in KEYS)


def modelling_file(config: Mapping[str, Any]) -> bytes:
    """Return the modelling file of a folder whose config.json names it, or its name of an earlier version.

    Raises:
        InputError: config.json names no class or type that transformers knows.
    """
    base = str((config.get("architectures") or [""])[0])
    own = own_config(config)
    dense = str(own.get("model_type"))
    if dense not in CONFIG_MAPPING or not base.isidentifier():
        raise InputError(
            f"config.json: architectures {base!r} and model_type {dense!r} are not known",
            hint="put back the config.json that was written with these weights",
        )
    row = row_of(CONFIG_MAPPING[dense].from_dict(own))
    # One file: the second text is put behind the first without its own heading of imports.
    texts = [inspect.getsource(one) for one in (modules, shapes)]
    text = texts[0] + _without_imports(texts[1])
    text += TEMPLATE.format(
        base=base,
        config=CONFIG_MAPPING[dense].__name__,
        kind=f"{SHIPPED_TYPE}{dense}",
        dense=dense,
        blocks=row.blocks if row else "",
        paths=pprint.pformat(row.paths() if row else {}, sort_dicts=False),
        sizes=native.CONFIG_KEY,
        products=factored.CONFIG_KEY,
    )
    return text.encode()


def _encode(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()


def _without_imports(text: str) -> str:
    """Return a module's text from its first class on, and before it what the text that precedes it lacks."""
    needed = "from collections.abc import Mapping  # noqa: E402\nfrom typing import Any  # noqa: E402"
    return f"\n\n{needed}\n\n\n{text[text.index('class ') :]}"
