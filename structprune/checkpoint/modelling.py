"""What a folder with factored linears carries for plain transformers: a modelling file, named in config.json.

structprune itself reads the list in config.json and never runs the file.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from structprune.models import factored, modules
from structprune.plan import Plan
from structprune.storage.durable import DurableFile
from structprune.storage.names import Names
from structprune.storage.stored_config import FACTORED_CLASS, MAX_CONFIG_BYTES
from structprune.storage.strict_json import read_json

FILE = f"{FACTORED_CLASS.partition('.')[0]}.py"

# What follows the text of `structprune/models/modules.py` in the file.
TEMPLATE = '''

from transformers import {base}  # noqa: E402


class {name}({base}):
    """{base} with the linears that config.json lists stored as products."""

    def __init__(self, config, *args, **kwargs):
        """Build the dense model, then put the products in the place of the listed linears."""
        super().__init__(config, *args, **kwargs)
        for path, (left, right) in config.{key}.items():
            parent, _, name = path.rpartition(".")
            linear = self.get_submodule(path)
            new = FactoredLinear(
                linear.in_features,
                linear.out_features,
                right,
                left,
                bias=linear.bias is not None,
                device=linear.weight.device,
                dtype=linear.weight.dtype,
            )
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
    kind = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    config |= {"auto_map": {kind: FACTORED_CLASS}, factored.CONFIG_KEY: listed}
    name = FACTORED_CLASS.rpartition(".")[2]
    text = Path(modules.__file__).read_text(encoding="utf-8")
    text += TEMPLATE.format(base=base, name=name, key=factored.CONFIG_KEY)
    hashes = {}
    for file, content in (("config.json", json.dumps(config, indent=2) + "\n"), (FILE, text)):
        with DurableFile(folder / file) as output:
            output.write(content.encode())
        hashes[file] = output.sha256
    return hashes
