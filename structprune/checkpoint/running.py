"""Plans of a folder that work while its model runs: what runs it carries them out, a rewrite loses them."""

from pathlib import Path

from structprune.checkpoint.plans import PLANS, plans_of
from structprune.errors import UsageError
from structprune.models.identity import applied
from structprune.models.streamed import Model
from structprune.plan.plan import Plan
from structprune.pruners.catalogue import find
from structprune.pruners.pruner import Pruner


def carry_on(model: Model, folder: Path) -> Model:
    """Carry out the plans that work while the model runs, and note the ids of those in its weights.

    Raises:
        UsageError: The model is streamed, and a plan works while it runs.
    """
    for plan in _plans(folder):
        pruner = _pruner_of(plan)
        if pruner.at_run_time:
            pruner.apply(model, plan)
        elif plan.id not in applied(model):
            # It is in the weights, and in the shapes that config.json tells of.
            applied(model).append(plan.id)
    return model


def running_methods(folder: Path) -> list[str]:
    """Return the methods of a folder's plans that work while its model runs, in order."""
    return [plan.method for plan in _plans(folder) if _pruner_of(plan).at_run_time]


def check_stored(folder: Path) -> None:
    """Check that all that was decided on a folder's model is in its weights, so that nothing would be lost.

    Raises:
        UsageError: A plan works while the model runs.
    """
    for plan in _plans(folder):
        if _pruner_of(plan).at_run_time:
            raise UsageError(
                f"{folder}: {plan.method} works while the model runs, after all that changes weights",
                hint=f"start from the model it was made from, and run {plan.method} last",
            )


def drops_tokens(folder: Path) -> bool:
    """Tell whether a folder's model computes fewer tokens than it is given, once it is loaded."""
    return any(key.kind == "tokens" for plan in _plans(folder) for key in plan)


def _plans(folder: Path) -> list[Plan]:
    return plans_of(folder) if (folder / PLANS).is_dir() else []


def _pruner_of(plan: Plan) -> Pruner:
    return find(plan.method).model_validate(plan.config)
