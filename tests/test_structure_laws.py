"""The laws of every pruner after which a model is smaller, on every family that it can prune."""

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from structprune.checkpoint.export import export
from structprune.errors import UsageError
from structprune.models.edited_reader import EditedReader
from structprune.models.identity import stored_layout
from structprune.models.native import CONFIG_KEY
from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.models.streamed import open_model
from structprune.models.tensor_edit import Layout
from structprune.progress import silent
from structprune.pruners.forecast import forecast_all
from structprune.storage.reader import CheckpointReader
from structprune.storage.tensor_file import nbytes_of
from tests.methods import STRUCTURE_METHODS, accepts, fits, home, quick
from tests.test_models_shapes import plain
from tests.tiny import FAMILIES, save_tiny, tiny, tokens

# One family of each way to keep a matrix: as it is, transposed, several experts in one.
LAYOUTS = {"llama", "gpt2", "mixtral"}


def cases() -> list[Any]:
    """Return every method with every family; what seldom tells more is slow."""
    return [
        pytest.param(name, family, marks=() if family in LAYOUTS else pytest.mark.slow, id=f"{name}-{family}")
        for name in STRUCTURE_METHODS
        for family in FAMILIES
    ]


def stored_bytes(layout: Layout) -> int:
    return sum(nbytes_of(dtype, shape) for entries in layout.values() for _, dtype, shape in entries)


@pytest.mark.parametrize(("method", "family"), cases())
def test_it_leaves_what_it_promises_streamed_and_resident_alike_and_opens_everywhere(
    method: str, family: str, tmp_path: Path
) -> None:
    pruner = quick(method)
    folder = save_tiny(family, tmp_path / "model", shards=2)
    if not fits(pruner, family):
        with pytest.raises(UsageError) as refused:
            forecast_all([pruner], tiny(family))
        assert refused.value.hint
        return
    data = [tokens(tiny(family), length=24, seed=seed) for seed in range(3)]
    models = [open_model(folder, Opening(stream=stream)) for stream in (False, True)]
    plans = [pruner.calibrate(model, data) for model in models]
    assert plans[0].id == plans[1].id

    below = CheckpointReader(folder)
    written = EditedReader(below, plans[0])
    promises = plans[0].promises
    assert promises is not None
    removed = sum(prod(shape) for shape in below.shapes.values()) - sum(
        prod(shape) for name, shape in written.shapes.items() if name in below.shapes
    )
    assert removed == promises.removed > 0
    (forecast,) = forecast_all([pruner], models[1])
    assert (forecast.unit, forecast.of) == (promises.unit, promises.of)
    if forecast.exact:
        assert forecast.reachable == removed
        # Headers name the tensors: where data decides which block loses them, they differ by a few bytes.
        assert stored_bytes(stored_layout(forecast.left)) == stored_bytes(written.layout)

    applied, streamed = (pruner.apply(model, plan) for model, plan in zip(models, plans, strict=True))
    expected = logits(applied, data[0])
    assert torch.equal(logits(streamed, data[0]), expected)
    (out := tmp_path / "out").mkdir()
    export(written, out, silent)
    assert torch.equal(logits(open_model(out), data[0]), expected)
    trust = CONFIG_KEY in plans[0].patch
    assert torch.equal(plain(out, trust=trust)(**data[0]).logits.float(), expected.float())
    if trust:
        with pytest.raises(ValueError, match="trust_remote_code"):
            plain(out, trust=False)


@pytest.mark.parametrize("method", STRUCTURE_METHODS)
def test_it_prunes_what_it_has_pruned_itself(method: str, tmp_path: Path) -> None:
    """Law 9: also as the second stage after one that changed shapes."""
    folder = home(method).save(tmp_path / "model")
    pruner = quick(method, sparsity=0.3) if accepts(method, sparsity=0.3) else quick(method)
    data = home(method).batches(2)
    made: list[tuple[str, torch.Tensor]] = []
    for stream in (False, True):
        model = open_model(folder, Opening(stream=stream))
        pruner.apply(model, pruner.calibrate(model, data))
        again = quick(method)
        if not _can(again, model):
            return
        second = again.calibrate(model, data)
        made.append((second.id, logits(again.apply(model, second), data[0])))
    assert made[0][0] == made[1][0]
    assert torch.equal(made[0][1], made[1][1])


def _can(pruner: Any, model: Any) -> bool:
    try:
        forecast_all([pruner], model)
    except UsageError:
        return False
    return True
