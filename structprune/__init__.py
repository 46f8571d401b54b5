"""structprune: prune language and vision-language models, prove it, recover them, evaluate them.

report = structprune.prune("demo", "out", "wanda")
model, tokenizer = structprune.load("out")
"""

from structprune.checkpoint.load import load
from structprune.errors import (
    EnvironmentFailure,
    InputError,
    Interrupted,
    QualityError,
    StructpruneError,
    UsageError,
    VerificationError,
)
from structprune.pipeline import apply, evaluate, inspect, prune, prune_each, recover, verify
from structprune.pipeline.packing import export
from structprune.plan import Plan
from structprune.pruner import Pruner, find
from structprune.recipe import Recipe
from structprune.version import __version__

__all__ = [
    "EnvironmentFailure",
    "InputError",
    "Interrupted",
    "Plan",
    "Pruner",
    "QualityError",
    "Recipe",
    "StructpruneError",
    "UsageError",
    "VerificationError",
    "__version__",
    "apply",
    "evaluate",
    "export",
    "find",
    "inspect",
    "load",
    "prune",
    "prune_each",
    "recover",
    "verify",
]
