"""Any score with any budget and any repair: it runs and holds the total, or the field is refused by name."""

import hashlib
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import structprune
from structprune import prune_each
from structprune.checkpoint.plans import plans_of, read_plans
from structprune.checkpoint.writing import Writing
from structprune.errors import InputError, UsageError
from structprune.models.arch import all_linears
from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.models.streamed import open_model
from structprune.plan.key import WRITTEN, Key
from structprune.plan.plan import Plan
from structprune.proof import fresh_process as fresh
from structprune.proof.verify import verify
from structprune.pruners import catalogue
from structprune.pruners.weight._family import WeightPruner
from structprune.pruners.weight._scored import ScorePruner
from tests.conftest import Command
from tests.methods import (
    CALIBRATION,
    EVALUATION,
    QUICK,
    TEXT,
    WEIGHT_METHODS,
    accepts,
    quick,
    short_runs,
    usual,
)
from tests.tiny import save_tiny, tiny, tokens

WHOLE = sum(parameter.numel() for parameter in tiny("llama").parameters())
PRUNABLE = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
LEFT = WHOLE - 30_001

BUDGETS: dict[str, Any] = {
    "uniform": "uniform",
    "owl": "owl",
    "ramp": {"name": "ramp", "spread": -0.1},
    "table": {"name": "table", "blocks": [0.2, 0.5]},
    "target_params": {"name": "target_params", "parameters": LEFT},
}
REPAIRS = ("none", "obs", "least_squares", "dsnot")
# Every budget and every repair beside the usual other one, and two where both are unusual, are always tried.
ALWAYS = {
    *product(BUDGETS, ("none",)),
    *product(("uniform",), REPAIRS),
    ("owl", "least_squares"),
    ("ramp", "obs"),
}
BOTH = [
    pytest.param(*both, marks=() if both in ALWAYS else pytest.mark.slow)
    for both in product(BUDGETS, REPAIRS)
]

AGAIN = Writing(overwrite=True, reload=False)


def weights(folder: Path) -> dict[str, str]:
    """Return the sha256 of every weight file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def removed(plan: Plan) -> int:
    return sum(sum(block.facts["removed"].values()) for block in plan.blocks)


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    with short_runs():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("source") / "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def kept(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that keeps its scores."""
    out = tmp_path_factory.mktemp("kept") / "out"
    structprune.prune(source, out, "nowag", keep_scores=True, **QUICK)
    return out


@pytest.mark.parametrize(("budget", "repair"), BOTH)
@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_every_score_runs_with_every_budget_and_repair_or_says_which_field_does_not_fit(
    method: str, budget: str, repair: str
) -> None:
    fields = {"sparsity": usual(method), "budget": BUDGETS[budget], "repair": repair}
    found = catalogue.find(method)
    assert issubclass(found, WeightPruner)
    wrong = [] if repair in ("none", *found.repairs) else ["repair"]
    wrong += ["budget"] if budget != "uniform" and isinstance(fields["sparsity"], str) else []
    if wrong:
        with pytest.raises(ValidationError, match=rf"({'|'.join(wrong)}): "):
            quick(method, **fields)
        return
    model = tiny("llama")
    data = [tokens(model, batch=2, length=32, seed=seed) for seed in range(2)]
    plan = quick(method, **fields).calibrate(model, data)
    half = PRUNABLE // 2
    assert removed(plan) == (WHOLE - LEFT if budget == "target_params" else half)
    masks = {key: plan[key] for key in plan if key.edit == "mask"}
    assert sum(int((~mask).sum()) for mask in masks.values()) == removed(plan)
    values = {key for key in plan if key.edit in WRITTEN}
    assert bool(values) == (not issubclass(found, ScorePruner) or repair in ("obs", "least_squares"))
    shares = [sum(block.facts["removed"].values()) / (PRUNABLE / 2) for block in plan.blocks]
    expected = {
        "ramp": pytest.approx([0.6, 0.4], abs=1e-3),
        "table": pytest.approx([2 / 7, 5 / 7], abs=1e-3),
        "uniform": [0.5, 0.5],
    }
    assert budget not in expected or shares == expected[budget]


@pytest.mark.parametrize("budget", ["owl", "ramp", "table", "target_params"])
def test_a_pattern_leaves_no_room_for_a_budget(budget: str) -> None:
    for method in WEIGHT_METHODS:
        assert not accepts(method, sparsity="2:4", budget=BUDGETS[budget])
        assert accepts(method, sparsity="2:4")


@pytest.mark.parametrize("repair", REPAIRS)
def test_a_pattern_survives_every_repair(repair: str) -> None:
    for method in WEIGHT_METHODS:
        if not accepts(method, sparsity="2:4", repair=repair):
            continue
        model = tiny("llama")
        pruner = quick(method, sparsity="2:4", repair=repair, skip="1")
        plan = pruner.calibrate(model, [tokens(model, batch=4)])
        for key in plan:
            if key.edit == "mask":
                assert plan[key].view(-1, 4).sum(dim=1).eq(2).all(), f"{method} {key}"


def test_a_refit_mask_is_that_of_the_method_and_loses_less() -> None:
    """A repair of the values leaves the choice alone; the exact refit is better than the update in order."""
    model = tiny("llama")
    data = [tokens(model, batch=4, length=64, seed=seed) for seed in range(4)]
    plans = {
        repair: quick("wanda", repair=repair, skip="1", propagate="dense").calibrate(model, data)
        for repair in ("none", "obs", "least_squares")
    }
    masks = [{key: plan[key] for key in plan if key.edit == "mask"} for plan in plans.values()]
    assert all(
        torch.equal(one, masks[1][key]) and torch.equal(one, masks[2][key]) for key, one in masks[0].items()
    )
    errors = {}
    inputs = _inputs(model, data)
    for repair, plan in plans.items():
        name = "model.layers.0.self_attn.q_proj.weight"
        weight = all_linears(model)[0][0].weight
        errors[repair] = float((inputs @ (weight - _carried_out(name, weight, plan)).T).square().sum())
    assert errors["least_squares"] < errors["obs"] < errors["none"]


SOLVERS = [name for name in WEIGHT_METHODS if not issubclass(catalogue.find(name), ScorePruner)]


class TestFieldsThatLiveElsewhere:
    @pytest.mark.parametrize("method", SOLVERS)
    def test_who_has_no_scores_refuses_to_keep_them_by_name(
        self, method: str, source: Path, command: Command, tmp_path: Path
    ) -> None:
        finished = command("prune", source, tmp_path / "out", "--method", method, "--keep-scores")
        assert finished.code == 2
        assert f"keep_scores: {method} chooses and updates at once and has no scores to keep" in finished.err
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(("method", "repair"), [("wanda", "obs"), ("sparsegpt", "least_squares")])
    def test_a_damping_beside_a_repair_is_told_where_it_lives_now(
        self, method: str, repair: str, source: Path, command: Command, tmp_path: Path
    ) -> None:
        words = ("prune", source, tmp_path / "out", "--method", method)
        finished = command(*words, "--set", "damping=0.02", "--set", f"repair={repair}")
        assert finished.code == 2
        assert f"repair: {{name: {repair}, damping: ...}}" in finished.err
        assert accepts(method, repair={"name": repair, "damping": 0.02})

    def test_a_method_that_solves_has_a_damping_of_its_own(self) -> None:
        repair = {"name": "least_squares", "damping": 0.5}
        pruner = quick("sparsegpt", damping=0.02, repair=repair).model_dump()
        assert (pruner["damping"], pruner["repair"]) == (0.02, repair)
        assert not accepts("magnitude", damping=0.02)

    @pytest.mark.parametrize(("name", "field"), [("obs", "damping"), ("least_squares", "damping")])
    def test_a_repairs_damping_changes_the_values_and_no_mask(self, name: str, field: str) -> None:
        model = tiny("llama")
        data = [tokens(model, batch=4)]
        plans = [
            quick("wanda", skip="1", repair={"name": name, field: value}).calibrate(model, data)
            for value in (0.01, 1.0)
        ]
        kinds = {key: torch.equal(plans[0][key], plans[1][key]) for key in plans[0]}
        assert all(equal for key, equal in kinds.items() if key.kind == "mask")
        assert not any(equal for key, equal in kinds.items() if key.kind == "value")

    def test_dsnots_fields_reach_its_swaps(self) -> None:
        model = tiny("llama")
        data = [tokens(model, batch=4)]

        def masks(repair: object) -> list[Tensor]:
            plan = quick("wanda", skip="1", repair=repair).calibrate(model, data)
            return [plan[key] for key in plan]

        def swapped(repair: object) -> int:
            return sum(
                int((one != other).sum()) for one, other in zip(masks(repair), masks("none"), strict=True)
            )

        usual, once = swapped("dsnot"), swapped({"name": "dsnot", "rounds": 1})
        assert 0 < once < usual
        assert swapped({"name": "dsnot", "threshold": 1e9}) == 0
        assert swapped({"name": "dsnot", "power": 0.0}) != usual


class TestThroughThePipeline:
    @pytest.mark.parametrize(("method", "fields"), [("sparsegpt", ()), ("wanda", ("repair=least_squares",))])
    @pytest.mark.parametrize(
        ("stored", "computed"),
        [
            ("bfloat16", "float32"),
            ("float32", "bfloat16"),
            pytest.param("float16", "float32", marks=pytest.mark.slow),
        ],
    )
    def test_a_run_in_another_dtype_than_the_files_is_verified(
        self,
        method: str,
        fields: tuple[str, ...],
        stored: str,
        computed: str,
        command: Command,
        tmp_path: Path,
    ) -> None:
        source = save_tiny("llama", tmp_path / "source", dtype=getattr(torch, stored))
        out = tmp_path / "out"
        sets = (f"dtype={computed}", f"calibration.source={TEXT}", "calibration.samples=4", *fields)
        sets = (*sets, "calibration.length=32", "evaluate.generations=false")
        words = [word for one in sets for word in ("--set", one)]
        finished = command("prune", source, out, "--method", method, "--json", *words)
        assert finished.code == 0, finished.err
        ids = {"input_ids": fresh.probe(open_model(source, Opening(stream=True)).config)}
        # What calibration saw of later blocks is what the folder holds: the applied plan and the reopened
        # folder compute the same.
        applied = catalogue.find(method)().apply(
            open_model(source, Opening(dtype=computed)), read_plans(out)[0]
        )
        reopened = open_model(out, Opening(dtype=computed))
        assert torch.equal(logits(applied, ids), logits(reopened, ids))
        assert next(reopened.parameters()).dtype == getattr(torch, computed)

    def test_wanda_owl_least_squares_is_verified_and_opens_in_plain_transformers(
        self, source: Path, tmp_path: Path
    ) -> None:
        report = structprune.prune(
            source,
            tmp_path / "out",
            "wanda",
            budget="owl",
            repair="least_squares",
            **QUICK | {"writing": Writing()},
        )
        assert report["verification"]["ok"] and report["sparsity"] == 0.5
        assert any("AutoModelForCausalLM" in loader for loader in report["loads_in"])
        again = structprune.verify(tmp_path / "out", str(source))
        assert again["ok"]
        assert {row["name"] for row in again["checks"]} >= {"values", "count", "masks", "reload", "source"}
        ids = fresh.probe(open_model(source, Opening(stream=True)).config)
        ours, _ = structprune.load(tmp_path / "out")
        (child,) = fresh.reload([fresh.ReloadJob(tmp_path / "out", ids, Opening(dtype="bfloat16"))])
        assert child.error == "" and child.logits is not None
        assert torch.equal(child.logits.float(), logits(ours, {"input_ids": ids}).float())

    @pytest.mark.parametrize("budget", ["ramp", "table", "target_params"])
    def test_every_other_budget_is_verified(self, budget: str, source: Path, tmp_path: Path) -> None:
        report = structprune.prune(source, tmp_path / "out", "wanda", budget=BUDGETS[budget], **QUICK)
        left = WHOLE - LEFT if budget == "target_params" else PRUNABLE // 2
        assert report["verification"]["ok"]
        assert report["sparsity"] == pytest.approx(left / PRUNABLE, abs=1e-9)
        if budget == "target_params":
            assert report["parameters"]["nonzero"] == LEFT

    def test_two_threads_and_one_give_results_that_hold(self, source: Path, tmp_path: Path) -> None:
        threads = torch.get_num_threads()
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                out = tmp_path / str(count)
                report = structprune.prune(source, out, "sparsegpt", **QUICK)
                assert report["verification"]["ok"] and report["sparsity"] == 0.5
                assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)

    def test_a_table_that_does_not_fit_is_refused_before_anything_is_written(
        self, source: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match=r"budget\.blocks: 3 numbers for 2 blocks"):
            structprune.prune(
                source,
                tmp_path / "out",
                "wanda",
                budget={"name": "table", "blocks": [0.1, 0.2, 0.3]},
                **QUICK,
            )
        with pytest.raises(UsageError, match=r"budget\.parameters: 5 of"):
            structprune.prune(
                source, tmp_path / "out", "wanda", budget={"name": "target_params", "parameters": 5}, **QUICK
            )
        assert not list(tmp_path.iterdir())


class TestSeveralSparsities:
    @pytest.mark.parametrize(("method", "looks"), [("nowag", 1), ("wanda", 3)])
    def test_three_at_once_are_three_single_runs(
        self, method: str, looks: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calibrated: list[int] = []
        whole = WeightPruner.calibrate_each

        def count(self: WeightPruner, model: Any, batches: Any, wanted: Any) -> list[Plan]:
            calibrated.append(len(wanted))
            return whole(self, model, batches, wanted)

        monkeypatch.setattr(WeightPruner, "calibrate_each", count)
        recipe = structprune.Recipe.model_validate(
            {"model": str(source), "output": tmp_path / "all", "prune": {"method": method}}
            | {"calibration": CALIBRATION, "evaluate": EVALUATION}
        )
        runs = prune_each(recipe, [0.3, 0.5, "2:4"], writing=Writing(reload=False))["runs"]
        assert len(calibrated) == looks
        assert [report["sparsity"] for report in runs.values()] == [
            pytest.approx(report["stages"][0]["reachable"]) for report in runs.values()
        ]
        for sparsity in (0.3, 0.5, "2:4"):
            single, out = tmp_path / "single", tmp_path / "all" / str(sparsity)
            structprune.prune(source, single, method, sparsity=sparsity, **QUICK | {"writing": AGAIN})
            assert weights(out) == weights(single)
            assert plans_of(out)[0].id == plans_of(single)[0].id
            assert verify(out, source, reload=False).ok
        assert not list((tmp_path / "all").glob("*.partial-*"))

    def test_the_command_line_takes_them_with_commas(
        self, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Any] = []
        stop = UsageError("seen", hint="nothing to do")

        def note(recipe: structprune.Recipe, sparsities: list[Any], **_: Any) -> dict[str, Any]:
            asked.append((recipe.prune[0].method(), sparsities))
            raise stop

        monkeypatch.setattr("structprune.prune_each", note)
        assert command("prune", "x", "out", "--method", "nowag", "--sparsity", "0.3,50%,2:4").code == 2
        assert asked == [("nowag", [0.3, 0.5, "2:4"])]

    def test_other_families_and_several_stages_are_refused(self, source: Path, tmp_path: Path) -> None:
        stages = [{"method": "magnitude", "sparsity": 0.25}, {"method": "wanda"}]
        recipe = structprune.Recipe.model_validate(
            {"model": str(source), "output": tmp_path / "out", "prune": stages}
        )
        with pytest.raises(UsageError, match="several goals need a recipe of one stage"):
            prune_each(recipe, [0.3, 0.5])
        assert not list(tmp_path.iterdir())


class TestKeptScores:
    @pytest.mark.parametrize("sparsity", [0.3, "2:4"])
    def test_deciding_from_them_gives_the_bytes_of_a_calibration(
        self, sparsity: float | str, kept: Path, source: Path, tmp_path: Path
    ) -> None:
        structprune.prune(source, tmp_path / "fresh", "nowag", sparsity=sparsity, **QUICK)
        report = structprune.prune(source, tmp_path / "out", "nowag", sparsity=sparsity, scores=kept, **QUICK)
        assert weights(tmp_path / "out") == weights(tmp_path / "fresh")
        assert report["verification"]["ok"] and report["calibration"] is None
        plan = plans_of(tmp_path / "out")[0]
        assert plan.facts["scores_of"] == plans_of(kept)[0].id
        assert not any(key.kind == "score" for key in plan)

    def test_methods_without_data_keep_scores_too_and_experts_keep_their_own(self, tmp_path: Path) -> None:
        model = save_tiny("mixtral", tmp_path / "model")
        structprune.prune(model, tmp_path / "kept", "magnitude", keep_scores=True, **QUICK)
        structprune.prune(model, tmp_path / "fresh", "magnitude", sparsity=0.3, **QUICK)
        structprune.prune(
            model, tmp_path / "out", "magnitude", sparsity=0.3, scores=tmp_path / "kept", **QUICK
        )
        assert weights(tmp_path / "out") == weights(tmp_path / "fresh")

    def test_scores_of_another_method_or_setting_are_refused_by_name(
        self, kept: Path, source: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match="made with another method"):
            structprune.prune(source, tmp_path / "out", "magnitude", scores=kept, **QUICK)
        with pytest.raises(UsageError, match="made with another skip"):
            structprune.prune(source, tmp_path / "out", "nowag", skip="1", scores=kept, **QUICK)
        assert not list(tmp_path.iterdir())

    def test_scores_of_other_weights_are_refused(self, kept: Path, tmp_path: Path) -> None:
        other = save_tiny("llama", tmp_path / "other", seed=1, dtype=torch.bfloat16)
        with pytest.raises(InputError, match="scores are of other weights"):
            structprune.prune(other, tmp_path / "out", "nowag", scores=kept, **QUICK)

    def test_a_folder_without_scores_is_refused(self, source: Path, tmp_path: Path) -> None:
        structprune.prune(source, tmp_path / "plain", "nowag", **QUICK)
        with pytest.raises(InputError, match="keeps no scores"):
            structprune.prune(source, tmp_path / "out", "nowag", scores=tmp_path / "plain", **QUICK)
        with pytest.raises(InputError, match="holds no plan"):
            structprune.prune(source, tmp_path / "out", "nowag", scores=source, **QUICK)

    @pytest.mark.parametrize(
        ("method", "fields"),
        [
            ("wanda", {}),  # later blocks see pruned ones: their scores depend on the sparsity
            ("sparsegpt", {"propagate": "dense"}),  # chooses while it updates
            ("nowag", {"repair": "least_squares"}),
            ("nowag", {"budget": "owl"}),
        ],
    )
    def test_scores_that_do_not_decide_alone_are_refused(
        self, method: str, fields: dict[str, Any], kept: Path, source: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match="scores alone do not decide"):
            structprune.prune(source, tmp_path / "out", method, scores=kept, **fields, **QUICK)

    def test_the_flags_keep_and_use_them(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Any] = []

        def note(recipe: structprune.Recipe, **options: Any) -> dict[str, Any]:
            asked.append((getattr(recipe.prune[0], "keep_scores", None), options["scores"]))
            raise UsageError("seen", hint="nothing to do")

        monkeypatch.setattr("structprune.pipeline.prune.prune", note)
        command("prune", "x", "out", "--method", "random", "--keep-scores")
        command("prune", "x", "out", "--method", "random", "--scores", "kept")
        assert asked == [(True, None), (False, Path("kept"))]


def test_the_total_of_every_fraction_is_the_floor_of_what_was_asked() -> None:
    model = tiny("llama")
    for sparsity in (0.001, 0.29, 0.333, 0.99):
        plan = quick("magnitude", sparsity=sparsity, budget="ramp").calibrate(model, [])
        assert removed(plan) == int(PRUNABLE * Fraction(str(sparsity)))


def _inputs(model: Any, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Return what the first block's attention reads, shape [tokens, hidden]."""
    embedded = [model.model.embed_tokens(batch["input_ids"]) for batch in data]
    return torch.cat([model.model.layers[0].input_layernorm(one).flatten(0, 1) for one in embedded]).detach()


def test_a_score_without_data_is_calibrated_where_its_budget_looks_at_some(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "model")
    report = structprune.prune(
        str(source), tmp_path / "out", "magnitude", budget="owl", calibration={"samples": 4, "length": 16}
    )
    assert report["calibration"] is not None
    assert report["sparsity"] == 0.5


def test_a_number_of_parameters_is_what_was_asked() -> None:
    budget = {"name": "target_params", "parameters": 12}
    assert catalogue.find("magnitude").model_validate({"budget": budget}).asked == "12 parameters"


def _carried_out(name: str, weight: Tensor, plan: Plan) -> Tensor:
    value = plan.get(Key(name, "value"), weight)
    return value.masked_fill(~plan[Key(name, "mask")], 0)
