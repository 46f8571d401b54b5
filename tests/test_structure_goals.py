"""Several sizes of a model with fewer units from one look, and from the scores that another run kept."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import structprune
import structprune.pruners.blockwise as blockwise
from structprune import prune_each
from structprune.checkpoint.plans import plans_of
from structprune.checkpoint.writing import Writing
from structprune.errors import InputError, UsageError
from tests.conftest import Command
from tests.methods import CALIBRATION, EVALUATION, QUICK, STRUCTURE_METHODS, accepts, home, quick, short_runs
from tests.tiny import save_tiny

DEPTH = 4
GOALS = [0.25, 0.5]
AGAIN = QUICK | {"writing": Writing(overwrite=True, reload=False)}


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    with short_runs():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in {home(one).family for one in STRUCTURE_METHODS}:
        save_tiny(family, folder / family, depth=DEPTH)
    return folder


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count the walks over the data, forward and backward."""
    found: list[str] = []
    for name in ("Walk", "backward"):
        whole = getattr(blockwise, name)

        def counted(*args: Any, name: str = name, whole: Any = whole, **options: Any) -> Any:
            found.append(name)
            return whole(*args, **options)

        monkeypatch.setattr(blockwise, name, counted)
    return found


def weights(folder: Path) -> dict[str, str]:
    found = sorted(folder.glob("*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def fields_of(method: str) -> dict[str, Any]:
    """Return the fields with which one look serves every goal."""
    return {"propagate": "dense"} if accepts(method, propagate="dense") else {}


@pytest.mark.parametrize("method", STRUCTURE_METHODS)
def test_two_sizes_take_one_look_and_are_two_runs(
    method: str, models: Path, looks: list[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model, fields = models / home(method).family, fields_of(method)
    assert quick(method, **fields).one_look
    recipe = structprune.Recipe.model_validate(
        {"model": str(model), "output": tmp_path / "all", "prune": {"method": method, **fields}}
        | {"calibration": CALIBRATION, "evaluate": EVALUATION}
    )
    runs = prune_each(recipe, GOALS, writing=QUICK["writing"])["runs"]
    # Each goal is held against the model as it is, not against what another one leaves of it.
    assert "whole units reach" not in caplog.text
    together = list(looks)
    for goal in GOALS:
        looks.clear()
        alone = structprune.prune(model, tmp_path / f"{goal}", method, sparsity=goal, **fields, **QUICK)
        assert looks == together
        assert weights(tmp_path / f"{goal}") == weights(tmp_path / "all" / f"{goal}")
        assert alone["stages"][0]["measured"] == runs[f"{goal}"]["stages"][0]["measured"]
        assert alone["parameters"] == runs[f"{goal}"]["parameters"]


KEPT: list[tuple[str, dict[str, Any]]] = [
    ("wanda_sp", {}),
    ("wanda_sp", {"budget": "global", "units": ["kv_group"]}),
    ("wanda_sp", {"repair": "bias", "skip": "1"}),
    ("wanda_sp", {"native": "pad", "budget": "global"}),
    ("flap", {}),
    ("cfsp", {"skip": "0"}),
    ("llm_pruner", {}),
    ("magnitude_units", {}),
    ("random_units", {"budget": "global"}),
    ("expert_drop", {"propagate": "dense"}),
    ("expert_drop", {"budget": "global"}),
]


@pytest.mark.parametrize(("method", "fields"), KEPT, ids=str)
def test_kept_scores_decide_without_data_what_a_look_would(
    method: str, fields: dict[str, Any], models: Path, looks: list[str], tmp_path: Path
) -> None:
    model = models / home(method).family
    more = fields_of(method) | fields
    structprune.prune(model, tmp_path / "kept", method, sparsity=0.25, keep_scores=True, **more, **QUICK)
    plain = structprune.prune(model, tmp_path / "plain", method, sparsity=0.25, **more, **QUICK)
    # To keep them changes nothing, and costs no second look.
    assert weights(tmp_path / "kept") == weights(tmp_path / "plain")
    assert looks[: len(looks) // 2] == looks[len(looks) // 2 :]
    fresh = structprune.prune(model, tmp_path / "fresh", method, sparsity=0.5, **more, **QUICK)
    looks.clear()
    scores = {"scores": tmp_path / "kept"}
    report = structprune.prune(model, tmp_path / "out", method, sparsity=0.5, **scores, **more, **QUICK)
    assert looks == [] and report["calibration"] is None
    assert weights(tmp_path / "out") == weights(tmp_path / "fresh") != weights(tmp_path / "kept")
    assert report["stages"][0]["measured"] == fresh["stages"][0]["measured"] != plain["stages"][0]["measured"]
    plan, kept = plans_of(tmp_path / "out")[0], plans_of(tmp_path / "kept")[0]
    assert plan.facts["scores_of"] == kept.id
    assert {key.kind for key in kept} - {key.kind for key in plan} == {"score"}


def test_another_size_may_be_said_in_another_way(models: Path, tmp_path: Path) -> None:
    model, common = models / "llama", {"budget": "global"}
    structprune.prune(model, tmp_path / "kept", "wanda_sp", keep_scores=True, **common, **QUICK)
    ways: list[dict[str, Any]] = [
        {"target_params": "120k"},
        {"sparsity": 0.4, "multiple": 8},
        {"native": "pad"},
    ]
    for fields in ways:
        for name, more in {"out": {"scores": tmp_path / "kept"}, "fresh": {}}.items():
            structprune.prune(model, tmp_path / name, "wanda_sp", **common, **fields, **more, **AGAIN)
        assert weights(tmp_path / "out") == weights(tmp_path / "fresh")


class TestRefused:
    @pytest.mark.parametrize(
        ("method", "words", "said"),
        [
            ("wanda_sp", ("repair=least_squares",), "keep_scores: scores alone do not decide with"),
            ("flap", ("propagate=pruned",), "keep_scores: scores alone do not decide with"),
            ("block_drop", (), "keep_scores: block_drop decides on all units together"),
            ("attention_skip", (), "keep_scores: attention_skip decides on all units together"),
        ],
    )
    def test_scores_that_would_serve_nobody_are_not_kept(
        self, method: str, words: tuple[str, ...], said: str, models: Path, command: Command, tmp_path: Path
    ) -> None:
        sets = [word for one in words for word in ("--set", one)]
        line = ("prune", models / "llama", tmp_path / "out", "--method", method, "--sparsity", "0.5")
        done = command(*line, "--keep-scores", *sets)
        assert done.code == 2
        assert said in done.err
        assert not list(tmp_path.iterdir())

    def test_scores_of_other_settings_or_weights_are_refused(self, models: Path, tmp_path: Path) -> None:
        kept, model = tmp_path / "kept", models / "llama"
        structprune.prune(model, kept, "flap", keep_scores=True, **QUICK)
        with pytest.raises(UsageError, match="made with another budget"):
            structprune.prune(model, tmp_path / "out", "flap", scores=kept, budget="uniform", **QUICK)
        with pytest.raises(UsageError, match="scores alone do not decide with"):
            structprune.prune(model, tmp_path / "out", "flap", scores=kept, propagate="pruned", **QUICK)
        with pytest.raises(UsageError, match="scores alone do not decide"):
            structprune.prune(model, tmp_path / "out", "block_drop", scores=kept, sparsity=0.5, **QUICK)
        other = save_tiny("llama", tmp_path / "other", seed=1, depth=DEPTH)
        with pytest.raises(InputError, match="scores are of other weights"):
            structprune.prune(other, tmp_path / "out", "flap", scores=kept, **QUICK)
        structprune.prune(model, tmp_path / "plain", "flap", **QUICK)
        with pytest.raises(InputError, match="keeps no scores"):
            structprune.prune(model, tmp_path / "out", "flap", scores=tmp_path / "plain", **QUICK)
