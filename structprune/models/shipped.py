"""How config.json of a folder of ours names the modelling file that it carries for plain transformers.

Where linears are stored as products, it names a type and classes of that file, so that nothing opens the
folder as the dense model with weights missing. structprune reads what is listed and never runs the file.
"""

from collections.abc import Mapping
from typing import Any

SHIPPED_CLASSES = ("modeling_factored.FactoredConfig", "modeling_factored.FactoredModel")
SHIPPED_TYPE = "factored_"


def is_shipped(config: Mapping[str, Any]) -> bool:
    """Tell whether a configuration names the modelling file of ours, and no other code."""
    named = config.get("auto_map")
    return isinstance(named, dict) and set(map(str, named.values())) == set(SHIPPED_CLASSES)


def own_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without what is added to it for plain transformers: our type and classes."""
    found = dict(config)
    if is_shipped(found):
        del found["auto_map"]
        found["model_type"] = str(found.get("model_type")).removeprefix(SHIPPED_TYPE)
    return found
