"""Scores that a plan keeps beside its decisions, and who may decide from them."""

from collections.abc import Collection

from structprune.errors import InputError, UsageError
from structprune.plan.plan import Plan
from structprune.pruners.pruner import Pruner


def check_kept_scores(pruner: Pruner, plan: Plan, free: Collection[str]) -> None:
    """Refuse a plan that a pruner cannot decide from: no scores, or made with other settings.

    Args:
        pruner: Who is to decide.
        plan: What an earlier run wrote.
        free: Fields that may differ, because no score depends on them.

    Raises:
        UsageError: The method or another field differs.
        InputError: The plan keeps no scores.
    """
    if not any(key.kind == "score" for key in plan):
        raise InputError("keeps no scores", hint="prune with --keep-scores first")
    config = {key: value for key, value in pruner.model_dump(mode="json").items() if key not in free}
    differing = [key for key in sorted(config) if config[key] != plan.config.get(key)]
    if plan.method != pruner.method():
        differing = ["method"]
    if differing:
        raise UsageError(f"made with another {', '.join(differing)}", hint="only the sparsity may differ")
