"""How config.json of a folder of ours names the modelling file that it carries for plain transformers.

Where blocks have sizes of their own or linears are stored as products, it names a type and classes of that
file, so that nothing opens the folder as the dense model with weights missing. structprune reads what is
listed and never runs the file.
"""

from collections.abc import Mapping
from typing import Any

SHIPPED_CLASSES = ("modeling_pruned.PrunedConfig", "modeling_pruned.PrunedModel")
SHIPPED_TYPE = "pruned_"
# What folders of products were called before blocks could be cut.
_FORMER = {("modeling_factored.FactoredConfig", "modeling_factored.FactoredModel"): "factored_"}


def is_shipped(config: Mapping[str, Any]) -> bool:
    """Tell whether a configuration names a modelling file of ours, and no other code."""
    return _prefix_of(config) is not None


def shipped_file(config: Mapping[str, Any]) -> str:
    """Return the name of the modelling file that a configuration of ours names."""
    return f"{next(iter(config['auto_map'].values())).partition('.')[0]}.py"


def own_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without what is added to it for plain transformers: our type and classes."""
    found = dict(config)
    prefix = _prefix_of(found)
    if prefix is not None:
        del found["auto_map"]
        found["model_type"] = str(found.get("model_type")).removeprefix(prefix)
    return found


def _prefix_of(config: Mapping[str, Any]) -> str | None:
    """Return what stands before the dense model's type where a configuration names our classes."""
    named = config.get("auto_map")
    classes = set(map(str, named.values())) if isinstance(named, dict) else set()
    known = {SHIPPED_CLASSES: SHIPPED_TYPE, **_FORMER}
    return next((prefix for pair, prefix in known.items() if classes == set(pair)), None)
