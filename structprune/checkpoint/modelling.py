"""What a folder with factored linears carries for plain transformers: a modelling file, named in config.json.

structprune itself reads the list in config.json and never runs the file.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import CONFIG_MAPPING

from structprune.models import factored, modules
from structprune.models.names import Names
from structprune.plan.plan import Plan
from structprune.storage.durable import DurableFile
from structprune.storage.stored_config import FACTORED_CLASSES, FACTORED_TYPE, MAX_CONFIG_BYTES
from structprune.storage.strict_json import read_json

FILE = f"{FACTORED_CLASSES[0].partition('.')[0]}.py"

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


def ship(folder: Path, plans: Sequence[Plan], names: Names) -> dict[str, str]:
    """Write config.json and the modelling file of a folder whose plans store products; nothing for others.

    Args:
        folder: The folder under work, its side files copied.
        plans: What was carried out on it.
        names: The model's names.

    Returns:
        The sha256 of each written file, by file name.
    """
    listed = factored.listed(plans, names)
    if not listed:
        return {}
    config = read_json(folder / "config.json", limit_bytes=MAX_CONFIG_BYTES)
    base = config["architectures"][0]
    vision = "ForConditionalGeneration" in base
    factory = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    dense = config["model_type"]
    config |= {
        "model_type": f"{FACTORED_TYPE}{dense}",
        "auto_map": dict(zip(("AutoConfig", factory), FACTORED_CLASSES, strict=True)),
        factored.CONFIG_KEY: listed,
    }
    text = Path(modules.__file__).read_text(encoding="utf-8") + TEMPLATE.format(
        base=base,
        config=CONFIG_MAPPING[dense].__name__,
        kind=config["model_type"],
        key=factored.CONFIG_KEY,
    )
    hashes = {}
    for file, content in (("config.json", json.dumps(config, indent=2) + "\n"), (FILE, text)):
        with DurableFile(folder / file) as output:
            output.write(content.encode())
        hashes[file] = output.sha256
    return hashes
