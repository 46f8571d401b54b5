"""The contract of every pruner, and the folder that is its registry.

A pruner looks at a model and data once and decides; the decision is a value, a `Plan`. Carrying it out
needs no data.
"""

import difflib
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from structprune import pruners
from structprune.errors import UsageError
from structprune.models.arch import blocks
from structprune.models.identity import architecture_of, carry_out
from structprune.models.streamed import Batch, Model
from structprune.plan.plan import Plan, PlanWriter


def achievable(stages: Sequence["Pruner"], model: Model) -> float:
    """Return the fraction of the prunable set that stages remove together; later ones find earlier zeros.

    Args:
        stages: In order; each with at least one linear or unit to prune.
        model: In memory or streamed.
    """
    removals: dict[str, tuple[int, int]] = {}
    for stage in stages:
        for name, found in stage.removals(model).items():
            removals[name] = max(found, removals.get(name, found))
    return sum(removed for removed, _ in removals.values()) / sum(size for _, size in removals.values())


class Pruner(BaseModel, ABC):
    """One pruning method; its fields are the keys of a recipe.

    Attributes:
        needs_data: False when `calibrate` ignores the batches.
        at_run_time: True when the saving exists only while structprune runs the model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs_data: ClassVar[bool] = True
    at_run_time: ClassVar[bool] = False

    @classmethod
    def method(cls) -> str:
        """Return the method's name, which is its file's."""
        return cls.__module__.rpartition(".")[2]

    @property
    def looks_at_data(self) -> bool:
        """Tell whether `calibrate` needs batches with the fields as they are."""
        return self.needs_data

    def added_parameters(self, model: Model) -> int:
        """Return how many parameters the result has more than the model."""
        return 0

    def remembered_bytes(self, model: Model) -> int:
        """Return at most how many bytes calibration remembers of one block, beside the activations."""
        return 0

    def writer(
        self,
        folder: Path | None,
        model: Model,
        weights: str,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> PlanWriter:
        """Return a writer for this pruner's plan.

        Args:
            folder: Where the plan is written, or None to keep it in memory.
            model: The model to decide on.
            weights: Hash of the model's weights.
            progress: Told (stage, done, total) after each block.
        """
        total = len(blocks(model))
        stage = f"calibrate {self.method()}"
        decided = (lambda done: progress(stage, done, total)) if progress else None
        config = self.model_dump(mode="json")
        return PlanWriter(folder, self.method(), config, architecture_of(model), weights, decided=decided)

    @abstractmethod
    def removals(self, model: Model) -> dict[str, tuple[int, int]]:
        """Return what rounding lets this pruner remove: by name of a matrix or unit, how many of how many."""

    @property
    @abstractmethod
    def asked(self) -> float | str:
        """Return what was asked for: a fraction removed, or "N:M"."""

    @abstractmethod
    def check(self, model: Model) -> None:
        """Check every size rule of the method on the model, before any data is looked at.

        Raises:
            UsageError: The model's shapes cannot carry what the fields ask for; names the tensor.
        """

    @abstractmethod
    def calibrate(self, model: Model, batches: Sequence[Batch], plan: PlanWriter | None = None) -> Plan:
        """Decide what to remove; the model is left bit-identical.

        Args:
            model: The dense model, in memory or streamed from disk.
            batches: Calibration data; ignored when `needs_data` is False.
            plan: Where to write the decisions as they are made; in memory when absent.
        """

    def apply(self, model: Model, plan: Plan) -> Model:
        """Carry a plan out; returns the same model, changed in place. Needs no data.

        Raises:
            InputError: The plan belongs to another architecture; the model is left as it was.
        """
        carry_out(model, plan)
        return model


def names() -> dict[str, str]:
    """Return every method's name with its family, from the folders on the path of `structprune.pruners`.

    Raises:
        UsageError: Two files claim one name; a recipe could then mean either.
    """
    return {name: path.parent.name for name, path in _files().items()}


def find(name: str) -> type[Pruner]:
    """Return the pruner class of a method.

    Args:
        name: The method's name, which is its file's: "wanda".

    Raises:
        UsageError: No such method; the nearest name is given.
    """
    known = _files()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(known)}"
        raise UsageError(f"method {name!r} does not exist", hint=hint)
    family = importlib.import_module(f"{pruners.__name__}.{known[name].parent.name}")
    if (folder := str(known[name].parent)) not in family.__path__:
        family.__path__.append(folder)  # a folder elsewhere that adds a method to a family known already
    module = importlib.import_module(f"{family.__name__}.{name}")
    found = [
        value
        for _, value in inspect.getmembers(module, inspect.isclass)
        if issubclass(value, Pruner) and value.__module__ == module.__name__
    ]
    return found[0]


def _files() -> dict[str, Path]:
    """Return the file of every method by its name; files that begin with an underscore are no methods."""
    found: dict[str, Path] = {}
    for path in sorted((file for root in pruners.__path__ for file in Path(root).glob("*/*.py")), key=str):
        if path.stem.startswith("_"):
            continue
        if path.stem in found:
            raise UsageError(f"two files are called {path.stem!r}: {found[path.stem]} and {path}")
        found[path.stem] = path
    return dict(sorted(found.items()))
