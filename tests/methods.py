"""The methods that the tests go through, found as the command line finds them, and runs that are short."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import PreTrainedModel

from structprune.checkpoint.writing import Writing
from structprune.errors import UsageError
from structprune.models.streamed import Batch
from structprune.pruners import catalogue
from structprune.pruners.forecast import forecast_all
from structprune.pruners.pruner import Pruner
from structprune.pruners.structure._family import StructurePruner
from structprune.pruners.weight._family import WeightPruner
from tests.pictures import Pictures
from tests.seeing import save_processor, save_rows
from tests.tiny import FAMILIES, save_tiny, tiny, tokens

# Any text will do; a short one is tokenised at once.
TEXT = str(Path(__file__).with_name("words.txt"))
CALIBRATION = {"source": TEXT, "samples": 6, "length": 32, "batch_size": 4}
EVALUATION = {"text": TEXT, "windows": 1, "length": 16, "generations": False}
QUICK: dict[str, Any] = {"calibration": CALIBRATION, "evaluate": EVALUATION, "writing": Writing(reload=False)}

METHODS = sorted(catalogue.names())
WEIGHT_METHODS = [name for name in METHODS if issubclass(catalogue.find(name), WeightPruner)]
STRUCTURE_METHODS = [name for name in METHODS if issubclass(catalogue.find(name), StructurePruner)]
# What they decide is carried out while the model runs; of all others it is stored.
TOKEN_METHODS = [name for name in METHODS if catalogue.find(name).at_run_time]
STORED_METHODS = [name for name in METHODS if name not in TOKEN_METHODS]


@dataclass(frozen=True)
class Home:
    """On what the laws of a method are tried.

    Attributes:
        family: Whose tiny model.
        depth: Its blocks.
        images: Whether it is shown prompts with images, else text.
    """

    family: str
    depth: int = 2
    images: bool = False

    def model(self, **options: Any) -> PreTrainedModel:
        """Build the model; options are those of `tiny`."""
        return tiny(self.family, depth=self.depth, **options)

    def save(self, folder: Path, **options: Any) -> Path:
        """Save the model and what reads its prompts; options are those of `save_tiny`."""
        save_tiny(self.family, folder, depth=self.depth, **options)
        return save_processor(folder) if self.images else folder

    def short_run(self, folder: Path) -> dict[str, Any]:
        """Return options of `structprune.prune` with which it is soon done; data are put into a folder."""
        if not self.images:
            return QUICK
        rows = str(save_rows(folder))
        asked = {"questions": rows, "generations": False}
        return QUICK | {"calibration": {"source": rows, "samples": 2}, "evaluate": asked}

    def batches(self, count: int = 3, seed: int = 0) -> list[Batch]:
        """Draw batches to decide on."""
        seeds = range(seed, seed + count)
        if self.images:
            return [Pictures(self.family, seed=one).batch() for one in seeds]
        model = self.model()
        return [tokens(model, length=24, seed=one) for one in seeds]


def fits(pruner: Pruner, home: str | Home) -> bool:
    """Tell whether a pruner can prune the tiny model of a family."""
    home = Home(home) if isinstance(home, str) else home
    try:
        forecast_all([pruner], home.model())
    except UsageError:
        return False
    return True


# A tiny model's image has 16 tokens.
LEAST = 1 / 16


@cache
def home(method: str) -> Home:
    """Return on what a method's laws are tried: the first family that it can prune."""
    # Who drops tokens in some blocks needs more of them than two.
    kind = {"depth": 4, "images": True} if method in TOKEN_METHODS else {}
    homes = (Home(family, **kind) for family in FAMILIES)
    return next(one for one in homes if fits(quick(method), one))


def accepts(method: str, **fields: Any) -> bool:
    """Tell whether a method can have these fields."""
    try:
        catalogue.find(method).model_validate(fields)
    except ValidationError:
        return False
    return True


def quick(method: str, **fields: Any) -> Pruner:
    """Build a pruner that stops its search early, and removes half of the units where units leave.

    A tiny model has two blocks and few groups: of less nothing might be left after rounding.
    """
    found = catalogue.find(method)
    few: dict[str, Any] = {"rounds": 2} if "rounds" in found.model_fields else {}
    half = {"sparsity": 0.5} if method in STRUCTURE_METHODS else {}
    return found.model_validate(few | half | reachable(found()) | fields)


def reachable(pruner: Pruner) -> dict[str, Any]:
    """Return a target in place of one that leaves no token of a tiny model's image."""
    target = getattr(pruner, "target", None)
    less = target is not None and (target.keep_ratio or 1) < LEAST
    return {"target": {"keep_ratio": LEAST}} if less else {}


def weigher(method: str, **fields: Any) -> WeightPruner:
    """Build a pruner of the weight family that stops its search early."""
    pruner = quick(method, **fields)
    assert isinstance(pruner, WeightPruner)
    return pruner


def usual(method: str) -> float | str:
    """Return half of the weights as a fraction, or as a pattern where the method needs one."""
    return 0.5 if accepts(method, sparsity=0.5) else "2:4"


@contextmanager
def short_runs() -> Iterator[None]:
    """Draw no plots, and evaluate next to nothing where nothing was said."""
    # By its path: the package has a function of that name too.
    finish, exam = (import_module(f"structprune.{name}") for name in ("pipeline.finish", "evaluation.exam"))
    import_module("structprune.pipeline.examine")  # once imported inside, it would keep the length for good
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "draw", lambda *_: None)
        patch.setattr(exam, "LEFT_LENGTH", 16)
        yield
