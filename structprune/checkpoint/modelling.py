"""What a folder with factored linears carries for plain transformers: a modelling file, named in config.json.

structprune itself reads the list in config.json and never runs the file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from structprune.errors import InputError
from structprune.models import factored, modules
from structprune.models.config_patch import merge_patch
from structprune.models.shipped import SHIPPED_CLASSES, SHIPPED_TYPE, own_config
from structprune.storage.durable import DurableFile
from structprune.storage.stored_config import MAX_CONFIG_BYTES, without_ignored
from structprune.storage.strict_json import read_json

FILE = f"{SHIPPED_CLASSES[0].partition('.')[0]}.py"

# What follows the text of `structprune/models/modules.py` in the file.
TEMPLATE = '''

from transformers import {base}, {config}  # noqa: E402


class FactoredConfig({config}):
    """{config} under a type of its own, so that nothing takes the folder for a dense one."""

    model_type = "{kind}"


class FactoredModel({base}):
    """{base} with the linears that config.json lists stored as products."""

    config_class = FactoredConfig

    def __init__(self, config, *args, **kwargs):
        """Build the dense model, then put the products in the place of the listed linears."""
        super().__init__(config, *args, **kwargs)
        for path, (left, right) in config.{key}.items():
            parent, _, name = path.rpartition(".")
            linear = self.get_submodule(path)
            new = FactoredLinear.like(linear, right, left)
            setattr(self.get_submodule(parent), name, new)
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

    Nothing where there is nothing to change: such a config.json stays as it is, byte for byte.

    Args:
        path: The config.json before the patch.
        patch: Keys with their new values.
    """
    read = read_json(path, limit_bytes=MAX_CONFIG_BYTES)
    kept = without_ignored(read)
    if not patch and kept == read:
        return {}
    config = merge_patch(own_config(kept), patch)
    if not needs_code(config):
        return {"config.json": _encode(config)}
    vision = "ForConditionalGeneration" in config["architectures"][0]
    factory = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    config["model_type"] = f"{SHIPPED_TYPE}{config['model_type']}"
    # The list comes last, as it is long.
    listed = config.pop(factored.CONFIG_KEY)
    config["auto_map"] = dict(zip(("AutoConfig", factory), SHIPPED_CLASSES, strict=True))
    config[factored.CONFIG_KEY] = listed
    return {"config.json": _encode(config), FILE: modelling_file(config)}


def needs_code(config: Mapping[str, Any] | PreTrainedConfig) -> bool:
    """Tell whether plain transformers needs the modelling file to open a model with this configuration."""
    found = config if isinstance(config, Mapping) else vars(config)
    return bool(found.get(factored.CONFIG_KEY))


def modelling_file(config: Mapping[str, Any]) -> bytes:
    """Return the modelling file of a folder whose config.json names it.

    Raises:
        InputError: config.json names no class or type that transformers knows.
    """
    base = str((config.get("architectures") or [""])[0])
    dense = str(config.get("model_type")).removeprefix(SHIPPED_TYPE)
    if dense not in CONFIG_MAPPING or not base.isidentifier():
        raise InputError(
            f"config.json: architectures {base!r} and model_type {dense!r} are not known",
            hint="put back the config.json that was written with these weights",
        )
    text = Path(modules.__file__).read_text(encoding="utf-8") + TEMPLATE.format(
        base=base,
        config=CONFIG_MAPPING[dense].__name__,
        kind=f"{SHIPPED_TYPE}{dense}",
        key=factored.CONFIG_KEY,
    )
    return text.encode()


def _encode(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()
