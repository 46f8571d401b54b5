"""The contract of every pruner.

A pruner looks at a model and data once and decides; the decision is a value, a `Plan`. Carrying it out
needs no data.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, Self, final

from pydantic import BaseModel, ConfigDict, ValidationError

from structprune.errors import UsageError
from structprune.models.arch import blocks
from structprune.models.edit import carry_out
from structprune.models.identity import describe
from structprune.models.streamed import Batch, Model
from structprune.plan.origin import Origin
from structprune.plan.plan import Plan, PlanWriter
from structprune.progress import Progress, silent
from structprune.pruners.demand import Demand, Sharing
from structprune.pruners.forecast import Forecast, WholeUnits


class Pruner(BaseModel, ABC):
    """One pruning method; its fields are the keys of a recipe.

    Attributes:
        needs_data: False when `calibrate` ignores the batches.
        reads: What the batches must hold; of text there may be any with images too.
        at_run_time: True when the saving exists only while structprune runs the model.
        scores_travel: True when kept scores serve any model of the same architecture, with a warning.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs_data: ClassVar[bool] = True
    reads: ClassVar[Literal["text", "images"]] = "text"
    at_run_time: ClassVar[bool] = False
    scores_travel: ClassVar[bool] = False

    @classmethod
    def method(cls) -> str:
        """Return the method's name, which is its file's."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    @final
    def own_file(cls) -> Path | None:
        """Return the method's file where it is none of the package's, whose version tells what it does."""
        name = getattr(sys.modules[cls.__module__], "__file__", None)
        return Path(name) if name and Path(__file__).parent not in Path(name).parents else None

    @final
    def called(self, what: str) -> str:
        """Return how an error names something of this method: with its file, where it is none of ours."""
        file = self.own_file()
        return f"{self.method()}: {what}" if file is None else f"{self.method()}, {file}: {what}"

    @property
    def looks_at_data(self) -> bool:
        """Tell whether `calibrate` needs batches with the fields as they are."""
        return self.needs_data

    @property
    def one_look(self) -> bool:
        """Tell whether what calibration sees is the same for every goal, so that one look serves several."""
        return False

    @property
    def weighs_blocks(self) -> bool:
        """Tell whether the plan's facts hold "importance", a number of each block of the stage's model."""
        return False

    @property
    def reusable(self) -> bool:
        """Tell whether kept scores are all that another goal needs."""
        return False

    def with_goal(self, goal: float | str) -> Self:
        """Return the same pruner with another goal: how much it removes or keeps.

        Raises:
            UsageError: The method has no such goal, or it cannot be this one.
        """
        raise UsageError(f"{self.method()} has no goal that could be varied", hint="run it once")

    @final
    def with_field(self, name: str, value: object) -> Self:
        """Return the same pruner with another value of one field.

        Raises:
            UsageError: The field cannot have it.
        """
        try:
            return type(self).model_validate({**self.model_dump(), name: value})
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            raise UsageError(
                f"{self.method()}: {name}: {reason}",
                hint=f"`structprune methods {self.method()}` says what it takes",
            ) from None

    def reach(self, model: Model) -> str | None:
        """Return what can be asked for of a model, in words; None where its goals are shares that leave.

        Args:
            model: In memory or streamed; its forecast was not refused.
        """
        return None

    def remembered_bytes(self, model: Model, ranks: int = 1) -> int:
        """Return at most how many bytes calibration remembers of one block, beside the activations.

        Args:
            model: In memory or streamed.
            ranks: Of each of so many processes that share the run.
        """
        return 0

    def demand(self, model: Model, sharing: Sharing) -> Demand | None:
        """Return what deciding takes, counted before anything runs; None where nobody has counted it.

        Args:
            model: In memory, streamed, or what an earlier stage's forecast leaves.
            sharing: How much data is looked at, and by how many processes.
        """
        return None

    def whole_units(self, model: Model) -> WholeUnits | None:
        """Return how many whole units can leave where they are few; None where nearly any share can.

        Raises:
            UsageError: The model has no such units.
        """
        return None

    def writer(
        self, folder: Path | None, model: Model, weights: str, progress: Progress = silent
    ) -> PlanWriter:
        """Return a writer for this pruner's plan.

        Args:
            folder: Where the plan is written, or None to keep it in memory.
            model: The model to decide on.
            weights: Hash of the model's weights.
            progress: Told (stage, done, total) after each block.
        """
        verb = "calibrate" if self.looks_at_data else "decide"
        total, stage = len(blocks(model)), f"{verb} {self.method()}"
        before = describe(model)
        origin = Origin(self.method(), self.model_dump(mode="json"), before.hash, weights, before)
        writer = PlanWriter(
            folder,
            origin,
            decided=lambda done: progress(stage, done, total),
            measured=partial(progress, f"measure {self.method()}"),
        )
        # The first block may take minutes, and nothing would be said before it is done.
        progress(stage, writer.finished, total)
        return writer

    @abstractmethod
    def forecast(self, model: Model) -> Forecast:
        """Return what this pruner will do to a model, before any data is looked at.

        Args:
            model: In memory, streamed, or what an earlier stage's forecast leaves.

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

    def calibrate_each(
        self, model: Model, batches: Sequence[Batch], wanted: Sequence[tuple[Self, PlanWriter]]
    ) -> list[Plan]:
        """Decide for several goals; with one look at the model where `one_look` says so.

        Args:
            model: The dense model.
            batches: Calibration data.
            wanted: Pruners that differ from this one only in the goal, each with its plan's writer.
        """
        return [pruner.calibrate(model, batches, writer) for pruner, writer in wanted]

    def check_scores(self, plan: Plan) -> None:
        """Check that this pruner can decide from the scores that a run with another goal kept.

        Raises:
            UsageError: Scores alone do not decide here, or they were made with other settings.
            InputError: The plan keeps no scores.
        """
        raise self._no_reuse()

    def reuse(self, plan: Plan, model: Model, writer: PlanWriter) -> Plan:
        """Decide from the scores that a run with another goal kept; needs no data.

        Args:
            plan: What that run wrote, of which `check_scores` is content.
            model: The model it was made on.
            writer: Where to write the decisions.
        """
        raise self._no_reuse()

    def undo(self, model: Model, plan: Plan) -> None:
        """Let a model be as it was before a plan was applied.

        Raises:
            UsageError: What was applied changed the weights, which are kept nowhere else.
        """
        raise UsageError(
            f"{self.method()} changes the weights, which cannot be undone", hint="open the model again"
        )

    def _no_reuse(self) -> UsageError:
        return UsageError(f"scores alone do not decide in {self.method()}", hint="calibrate again")

    def apply(self, model: Model, plan: Plan) -> Model:
        """Carry a plan out; returns the same model, changed in place. Needs no data.

        Raises:
            InputError: The plan belongs to another architecture; the model is left as it was.
        """
        carry_out(model, plan)
        return model
