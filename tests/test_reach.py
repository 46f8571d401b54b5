"""What is asked for, what whole units reach, what a model had lost before: said, or refused, beforehand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import structprune
from structprune.calibration.statistics import Statistics
from structprune.checkpoint.source import open_source
from structprune.decide.counts import reached_near
from structprune.errors import InputError, QualityError, UsageError
from structprune.models.arch import all_linears
from structprune.models.opening import Opening
from structprune.models.streamed import open_skeleton
from structprune.proof.measure import places
from structprune.proof.prior import Prior, prior_of
from structprune.pruners.forecast import Forecast, forecast_all
from structprune.recipe.recipe import Recipe
from structprune.solvers.matrix import MatrixToPrune
from tests.conftest import Command
from tests.methods import QUICK, WEIGHT_METHODS, accepts, quick, short_runs, weigher
from tests.tiny import save_tiny, tiny, tokens

# Those that leave half of the weights; ARMOR writes products.
HALVES = [
    (method, sparsity)
    for method in WEIGHT_METHODS
    for sparsity in (0.5, "2:4")
    if method != "armor" and accepts(method, sparsity=sparsity)
]


@pytest.fixture(scope="module")
def holed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which every row of every linear has lost three tenths, not its smallest weights."""
    return with_zeros(save_tiny("llama", tmp_path_factory.mktemp("holed") / "llama"), 0.3)


@torch.no_grad()
def with_zeros(folder: Path, share: float, of: int | None = None) -> Path:
    """Set to zero a share of every row, or so many of every `of` inputs, wherever a generator says."""
    generator = torch.Generator().manual_seed(3)
    names = places(open_skeleton(folder))
    file = folder / "model.safetensors"
    found = load_file(file)
    for name in names:
        weight = found[name]
        groups = weight.view(-1, of or weight.shape[1])
        order = torch.rand(groups.shape, generator=generator).argsort(dim=1)
        groups[order < int(share * groups.shape[1])] = 0.0
    save_file(found, file, metadata={"format": "pt"})
    return folder


def zeros_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Return zeros and size of every linear in a folder's files."""
    found = load_file(folder / "model.safetensors")
    return {
        name: (int((found[name] == 0).sum()), found[name].numel()) for name in places(open_skeleton(folder))
    }


class TestWhatWholeUnitsReach:
    def test_next_to_a_hundredth_of_sixty_four_are_none_and_one(self) -> None:
        assert reached_near([(8, 64)], 0.01) == (0.0, 0.0157)

    def test_of_a_whole_matrix_almost_everything_is_reached(self) -> None:
        below, above = reached_near([(8, 64)], 0.01, "matrix")
        assert below == 0.00977
        assert above == 0.0118
        assert int(below * 512) == 5
        assert int(above * 512) == 6

    def test_a_pattern_has_no_neighbours(self) -> None:
        assert reached_near([(8, 64)], "2:4") == ()

    @pytest.mark.parametrize("asked", [0.0001, 0.003, 0.017, 0.1, 0.33, 0.5, 0.97])
    def test_what_is_offered_is_reached(self, asked: float) -> None:
        pruner = weigher("wanda", sparsity=asked)
        near = reached_near([(8, 64), (3, 96), (5, 7)], asked)
        assert near[0] <= asked
        assert all(
            forecast_all([pruner.with_goal(value)], tiny("llama"))[0].share >= 0.8 * value for value in near
        )

    def test_asking_for_next_to_nothing_is_refused_with_what_is_legal(self) -> None:
        with pytest.raises(
            UsageError, match=r"asked for 0.001 of the weights, whole units reach 0 "
        ) as raised:
            forecast_all([quick("wanda", sparsity=0.001)], tiny("llama"))
        below, above = raised.value.hint.removeprefix("ask for ").split(" or ")
        assert float(below) == 0
        assert forecast_all([quick("wanda", sparsity=float(above))], tiny("llama"))[0].reachable

    def test_asking_for_a_little_more_than_is_reached_is_told(self, caplog: pytest.LogCaptureFixture) -> None:
        (one,) = forecast_all([quick("wanda", sparsity=0.02)], tiny("llama"))
        assert one.share is not None
        assert 0.5 <= one.share / 0.02 < 0.9
        assert "asked for 0.02 of the weights, whole units reach 0.01" in caplog.text

    @pytest.mark.parametrize("sparsity", [0, 0.5, "2:4", 0.25])
    def test_what_is_reached_is_not_spoken_of(
        self, sparsity: float | str, caplog: pytest.LogCaptureFixture
    ) -> None:
        forecast_all([quick("wanda", sparsity=sparsity)], tiny("llama"))
        assert caplog.text == ""

    def test_a_budget_reaches_what_its_rows_could_not(self) -> None:
        (one,) = forecast_all([quick("wanda", sparsity=0.001, budget="owl")], tiny("llama"))
        assert one.share == pytest.approx(0.001, rel=0.02)

    @pytest.mark.parametrize("asked", ["900000 parameters", 1, 1.0, "8 tokens", 12])
    def test_only_shares_are_held_against_what_is_reached(self, asked: float | str) -> None:
        left = tiny("llama")
        assert Forecast("parameters", asked, 5, 5, left).check() is None  # type: ignore[func-returns-value]

    @pytest.mark.parametrize("more", [["--dry-run"], ["--stream"], []])
    def test_the_command_line_refuses_before_it_calibrates(
        self, more: list[str], command: Command, llama: Path, tmp_path: Path
    ) -> None:
        words = [
            "prune",
            llama,
            tmp_path / "out",
            "--method",
            "wanda",
            "--sparsity",
            "0.001",
            "--json",
            *more,
        ]
        done = command(*words)
        assert (done.code, done.json["error"]["kind"]) == (2, "usage")
        assert "ask for 0 or 0.0" in done.json["error"]["hint"]
        assert "calibrate" not in done.err
        assert not list(tmp_path.iterdir())

    def test_several_goals_are_refused_when_one_is(
        self, command: Command, llama: Path, tmp_path: Path
    ) -> None:
        done = command("prune", llama, tmp_path / "out", "--method", "wanda", "--sparsity", "0.5,0.001")
        assert done.code == 2
        assert not list(tmp_path.iterdir())


class TestAModelThatIsPrunedAlready:
    @pytest.mark.parametrize(("method", "sparsity"), HALVES)
    def test_what_is_asked_for_is_what_is_zero_afterwards(self, method: str, sparsity: float | str) -> None:
        """A score ranks zeros lowest; a solver may move its weights about, its counts are the same."""
        model = tiny("llama")
        model_with_zeros(model)
        pruner = weigher(method, sparsity=sparsity)
        plan = pruner.calibrate(model, [tokens(model, batch=2, length=16)])
        pruner.apply(model, plan)
        for linear in (one for block in all_linears(model) for one in block):
            zeros = (linear.weight == 0).sum(dim=1)
            if pruner.compare == "row" or sparsity == "2:4":
                assert zeros.tolist() == [linear.weight.shape[1] // 2] * len(zeros), linear.label
            else:
                assert int(zeros.sum()) == linear.weight.numel() // 2, linear.label

    def test_a_score_that_is_not_a_number_stays_refused(self) -> None:
        pruner = weigher("magnitude")
        matrix = MatrixToPrune("one", torch.zeros(2, 4), 2, None, Statistics())
        with pytest.raises(QualityError):
            pruner._keep_highest(matrix, torch.full((2, 4), torch.nan))  # type: ignore[attr-defined]

    @pytest.mark.parametrize("method", ["wanda", "random"])
    def test_a_run_says_what_it_found_and_ends_where_it_was_asked_to(
        self, method: str, holed: Path, tmp_path: Path, command: Command
    ) -> None:
        before = zeros_in(holed)
        share = sum(zeros for zeros, _ in before.values()) / sum(size for _, size in before.values())
        with short_runs():
            report = structprune.prune(str(holed), tmp_path / "out", method, sparsity=0.5, **QUICK)
        assert report["sparsity"] == 0.5
        assert report["stages"][0]["measured"] == report["stages"][0]["reachable"] == 0.5
        assert report["found"] == {
            "zeros": sum(zeros for zeros, _ in before.values()),
            "of": sum(size for _, size in before.values()),
            "sparsity": share,
            "pattern": "unstructured",
            "method": None,
            "pruned": True,
        }
        assert all(zeros * 2 == size for zeros, size in zeros_in(tmp_path / "out").values())
        saved = json.loads((tmp_path / "out" / "structprune" / "report.json").read_text())
        assert saved["found"] == report["found"]
        card = (tmp_path / "out" / "README.md").read_text()
        assert "It was pruned before: 29.58% of the weights" in card
        assert "| Zeros in the pruned matrices | 29.58% | 50.00% |" in card

    def test_dry_run_and_inspect_say_the_same(self, holed: Path, tmp_path: Path, command: Command) -> None:
        words = ["prune", holed, tmp_path / "out", "--method", "wanda", "--sparsity", "0.2", "--dry-run"]
        done, seen = command(*words, "--json"), command("inspect", holed, "--json")
        assert done.json["found"] == seen.json["found"]
        assert seen.json["found"]["pruned"] is True
        assert "is pruned already: 29.58% of the weights of its linears are zero (unstructured)" in done.err
        assert "asked for 0.2 of the weights, 0.296 of them are gone already" in done.err

    def test_a_dense_model_is_not_spoken_of(self, llama: Path, tmp_path: Path, command: Command) -> None:
        done = command("prune", llama, tmp_path / "out", "--method", "wanda", "--dry-run", "--json")
        assert done.json["found"] == {
            "zeros": 0,
            "of": done.json["found"]["of"],
            "sparsity": 0.0,
            "pattern": "dense",
            "method": None,
            "pruned": False,
        }
        assert "pruned already" not in done.err

    @pytest.mark.parametrize("goals", [(), (0.5, 0.6)])
    def test_from_dense_refuses_it(self, goals: tuple[float, ...], holed: Path, tmp_path: Path) -> None:
        opening = Opening(from_dense=True)
        recipe = Recipe.model_validate(
            {"model": str(holed), "output": tmp_path / "out", "prune": {"method": "wanda"}}
        )
        for run in (structprune.prune, structprune.dry_run):
            with pytest.raises(InputError, match=r"is pruned already: 29.58% of the weights"):
                run(recipe, opening=opening)
        with pytest.raises(InputError, match="is pruned already"):
            structprune.prune_each(recipe, [0.5, 0.6], opening=opening)
        assert not list(tmp_path.iterdir())

    def test_from_dense_lets_a_dense_one_pass(self, llama: Path, tmp_path: Path) -> None:
        recipe = Recipe.model_validate(
            {"model": str(llama), "output": tmp_path / "out", "prune": {"method": "wanda"}}
        )
        assert structprune.dry_run(recipe, opening=Opening(from_dense=True))["found"]["pruned"] is False


class TestThePatternThatWasFound:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "phi3"])
    def test_of_a_folder_of_ours_with_its_method(self, family: str, tmp_path: Path) -> None:
        source = save_tiny(family, tmp_path / family)
        with short_runs():
            structprune.prune(str(source), tmp_path / "out", "magnitude", sparsity="2:4", **QUICK)
        found = look(tmp_path / "out")
        assert (found.sparsity, found.pattern, found.method) == (0.5, "2:4", "magnitude")
        assert str(found) == (
            "50% of the weights of its linears are zero (2:4), by structprune with magnitude"
        )

    def test_of_a_folder_of_anybody(self, tmp_path: Path) -> None:
        found = look(with_zeros(save_tiny("llama", tmp_path / "llama"), 0.5, of=8))
        assert (found.sparsity, found.pattern, found.method) == (0.5, "4:8", None)

    def test_where_some_blocks_are_dense(self, tmp_path: Path) -> None:
        with short_runs():
            structprune.prune(
                str(save_tiny("llama", tmp_path / "llama")),
                tmp_path / "out",
                "magnitude",
                sparsity="2:4",
                skip="0",
                **QUICK,
            )
        shutil.rmtree(tmp_path / "out" / "structprune")
        (tmp_path / "out" / "structprune.json").unlink()
        found = look(tmp_path / "out")
        assert (found.sparsity, found.pattern, found.method) == (0.25, "2:4", None)

    def test_a_few_zeros_are_nobodys_work(self) -> None:
        assert not Prior(9, 1000, "dense", None).pruned
        assert Prior(10, 1000, "unstructured", None).pruned
        assert Prior(0, 1000, "dense", "armor").pruned


def look(folder: Path) -> Prior:
    source = open_source(str(folder), folder, Opening(stream=True))
    return prior_of(source.model, source.reader, source.scan.zeros, source.opening)


@torch.no_grad()
def model_with_zeros(model: PreTrainedModel) -> None:
    """Set to zero one weight of every four, so that neither a row nor a group has lost half."""
    generator = torch.Generator().manual_seed(5)
    for linear in (one for block in all_linears(model) for one in block):
        groups = linear.weight.view(-1, 4)
        groups[torch.arange(len(groups)), torch.randint(4, (len(groups),), generator=generator)] = 0.0
