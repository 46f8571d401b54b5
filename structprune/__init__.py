"""structprune: prune language and vision-language models, prove it, recover them, evaluate them.

report = structprune.prune("demo", "out", "wanda")
model, tokenizer = structprune.load("out")

How a model is opened and how a result is written are values that every function takes whole:
`prune("demo", "out", "wanda", writing=Writing(overwrite=True))`, `load("out", Opening(stream=True))`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from structprune.errors import (
    EnvironmentFailure,
    InputError,
    Interrupted,
    QualityError,
    StructpruneError,
    UsageError,
    VerificationError,
)
from structprune.machine import check_process
from structprune.version import __version__

if TYPE_CHECKING:
    from structprune.checkpoint.load import load as load
    from structprune.checkpoint.writing import Writing as Writing
    from structprune.machine import environment as environment
    from structprune.models.opening import Opening as Opening
    from structprune.models.processor import processor as processor
    from structprune.pipeline.apply import apply as apply
    from structprune.pipeline.bench import bench as bench
    from structprune.pipeline.dry_run import dry_run as dry_run
    from structprune.pipeline.evaluate import evaluate as evaluate
    from structprune.pipeline.export import export as export
    from structprune.pipeline.inspect import inspect as inspect
    from structprune.pipeline.methods import methods as methods
    from structprune.pipeline.prune import prune as prune
    from structprune.pipeline.rates import bench_rates as bench_rates
    from structprune.pipeline.recover import recover as recover
    from structprune.pipeline.report import report_runs as report_runs
    from structprune.pipeline.show import show as show
    from structprune.pipeline.sweep import prune_each as prune_each
    from structprune.pipeline.verify import verify as verify
    from structprune.plan.plan import Plan as Plan
    from structprune.pruners.catalogue import find as find
    from structprune.pruners.pruner import Pruner as Pruner
    from structprune.pruners.while_running import pruning as pruning
    from structprune.recipe.options import BenchOptions as BenchOptions
    from structprune.recipe.options import EvaluateOptions as EvaluateOptions
    from structprune.recipe.options import RecoverOptions as RecoverOptions
    from structprune.recipe.recipe import Recipe as Recipe
    from structprune.recipe.recipe import choose_recipe as choose_recipe
    from structprune.runtime.attach import paused as paused

# Found when they are first asked for: torch and transformers take seconds to import, `--help` should not.
_HOMES = {
    "BenchOptions": "recipe.options",
    "EvaluateOptions": "recipe.options",
    "Opening": "models.opening",
    "Plan": "plan.plan",
    "Pruner": "pruners.pruner",
    "Recipe": "recipe.recipe",
    "RecoverOptions": "recipe.options",
    "Writing": "checkpoint.writing",
    "apply": "pipeline.apply",
    "bench": "pipeline.bench",
    "bench_rates": "pipeline.rates",
    "choose_recipe": "recipe.recipe",
    "dry_run": "pipeline.dry_run",
    "environment": "machine",
    "evaluate": "pipeline.evaluate",
    "export": "pipeline.export",
    "find": "pruners.catalogue",
    "inspect": "pipeline.inspect",
    "load": "checkpoint.load",
    "methods": "pipeline.methods",
    "paused": "runtime.attach",
    "processor": "models.processor",
    "prune": "pipeline.prune",
    "prune_each": "pipeline.sweep",
    "pruning": "pruners.while_running",
    "recover": "pipeline.recover",
    "report_runs": "pipeline.report",
    "show": "pipeline.show",
    "verify": "pipeline.verify",
}

__all__ = [
    "BenchOptions",
    "EnvironmentFailure",
    "EvaluateOptions",
    "InputError",
    "Interrupted",
    "Opening",
    "Plan",
    "Pruner",
    "QualityError",
    "Recipe",
    "RecoverOptions",
    "StructpruneError",
    "UsageError",
    "VerificationError",
    "Writing",
    "__version__",
    "apply",
    "bench",
    "bench_rates",
    "choose_recipe",
    "dry_run",
    "environment",
    "evaluate",
    "export",
    "find",
    "inspect",
    "load",
    "methods",
    "paused",
    "processor",
    "prune",
    "prune_each",
    "pruning",
    "recover",
    "report_runs",
    "show",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Return a public function or class from the module that it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module 'structprune' has no attribute {name!r}")
    check_process()  # before the imports, which would end it with less than a line
    return getattr(importlib.import_module(f"structprune.{_HOMES[name]}"), name)
