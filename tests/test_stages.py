"""One stage after another: each finds what the one before it left, in memory and streamed alike."""

import json
from pathlib import Path

import pytest
import torch

from structprune.checkpoint.plans import plans_of
from structprune.models.cost import file_bytes, parameters_of
from structprune.models.edited_reader import EditedReader
from structprune.models.identity import stored_layout
from structprune.models.opening import Opening
from structprune.models.streamed import StreamedModel, open_model
from structprune.pruners.forecast import forecast_all
from structprune.recovery.masks import masks_of
from structprune.storage.reader import CheckpointReader
from tests.conftest import Command
from tests.methods import STORED_METHODS, home, quick, short_runs
from tests.tiny import save_tiny

ARMOR = {"method": "armor", "sparsity": "2:4", "wrapper_size": 8, "rounds": 2}
ON_ITS_CORES = [ARMOR, {"method": "magnitude", "sparsity": "1:4", "include": ["core"]}]
BESIDE_IT = [
    ARMOR | {"exclude": ["down_proj"]},
    {"method": "magnitude", "sparsity": 0.5, "include": ["down_proj"]},
]
ANEW = [{"method": "wanda", "sparsity": 0.25}, {"method": "sparsegpt", "sparsity": 0.5}]
SPARSER = [{"method": "wanda", "sparsity": "4:8"}, {"method": "magnitude", "sparsity": "1:4"}]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("stages") / "llama", shards=2, dtype=torch.bfloat16)
    (folder / "text.txt").write_text("A line of text that is long enough to be read. " * 60)
    return folder


@pytest.mark.parametrize(
    ("stages", "removed"),
    [
        # Three of four weights of every core.
        pytest.param(ON_ITS_CORES, 0.75, marks=pytest.mark.slow),
        # Half of every core, and half of every row of what is no product.
        pytest.param(BESIDE_IT, 0.5, marks=pytest.mark.slow),
        # A group in which the first stage left nothing keeps one zero more.
        (SPARSER, 0.7535),
        # What the first stage removed may come back: all that stays is updated.
        (ANEW, 0.5),
    ],
    ids=["on its cores", "beside it", "two patterns", "anew"],
)
def test_the_second_stage_removes_what_it_finds_streamed_and_resident_alike(
    stages: list[dict[str, object]], removed: float, source: Path, tmp_path: Path, command: Command
) -> None:
    calibration = {"source": str(source / "text.txt"), "samples": 4, "length": 16}
    made = {}
    for way in ("--resident", "--stream"):
        recipe = tmp_path / f"recipe{way}.yaml"
        out = tmp_path / f"out{way}"
        content = {"model": str(source), "output": str(out), "prune": stages, "calibration": calibration}
        recipe.write_text(json.dumps(content))
        with short_runs():
            planned = command("prune", recipe, "--dry-run", way, "--json").json
            report = command("prune", recipe, way, "--json").json
        assert planned["bytes"]["pruned"] == report["bytes"]["pruned"]
        assert planned["parameters"]["pruned"] == report["parameters"]["pruned"]
        for stage, told in zip(report["stages"], planned["stages"], strict=True):
            assert stage["measured"] == stage["reachable"] == told["reachable"] > 0
        assert report["sparsity"] == pytest.approx(removed, abs=5e-4)
        plans = plans_of(out)
        made[way] = {
            "plans": [plan.id for plan in plans],
            "architectures": [plan.architecture for plan in plans],
            "weights": {file.name: file.read_bytes() for file in out.glob("*.safetensors")},
            "config": (out / "config.json").read_bytes(),
        }
    assert made["--resident"] == made["--stream"]
    # All plans together leave what the files hold.
    model = open_model(tmp_path / "out--stream", Opening(stream=False))
    for name, kept in masks_of(model, plans).items():
        assert torch.equal(kept, model.get_parameter(name) != 0)


@pytest.mark.parametrize("method", STORED_METHODS)
def test_law_11_the_forecast_counts_the_parameters_and_bytes_that_are_written(
    method: str, tmp_path: Path
) -> None:
    folder = home(method).save(tmp_path / "model", shards=2, dtype=torch.bfloat16)
    model = open_model(folder, Opening(stream=True))
    assert isinstance(model, StreamedModel)
    before = {name: parameter.shape for name, parameter in model.skeleton.named_parameters()}
    pruner = quick(method)
    (forecast,) = forecast_all([pruner], model)
    assert {name: parameter.shape for name, parameter in model.skeleton.named_parameters()} == before
    below = CheckpointReader(folder)
    plan = pruner.calibrate(model, home(method).batches(2))
    written = EditedReader(below, plan)
    assert all(parameter.is_meta for parameter in forecast.left.parameters())
    assert plan.promises is not None
    assert plan.promises.of == forecast.of
    if not forecast.exact:  # the data decides how much leaves where
        assert forecast.reachable is None
        return
    assert plan.promises.removed == forecast.reachable
    assert file_bytes(stored_layout(forecast.left), below.metadata) == file_bytes(
        written.layout, below.metadata
    )
    pruner.apply(model, plan)
    assert parameters_of(forecast.left) == parameters_of(model.skeleton)
