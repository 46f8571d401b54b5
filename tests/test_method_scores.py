"""What a method's score may be is checked where it enters, in every family: as many numbers as asked."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import structprune
from structprune.calibration.statistics import Statistics
from structprune.decide.verdicts import Verdict
from structprune.errors import MethodError, QualityError
from structprune.pruners.structure._depth import DepthPruner
from structprune.pruners.structure.expert_drop import ExpertDrop
from tests.authors import Author, decide, writing_methods
from tests.methods import QUICK
from tests.oracle import pictures, pruned, token_pruner, vision_model
from tests.tiny import tiny, tokens

# Of a tiny Llama: 96 channels read and write 64 hidden features, in two blocks; k and v write 32.
BLOCK, K = "model.layers.0", "model.layers.0.self_attn.k_proj"

SOLVER = """
import math

from structprune.decide.select import mask_lowest
from structprune.pruners.weight._family import WeightPruner
from structprune.solvers.matrix import PrunedMatrix


class Solver(WeightPruner):
    parts = frozenset({'norm'})

    def solve(self, matrices, seen):
        return """


@pytest.fixture
def author(tmp_path: Path) -> Iterator[Author]:
    with writing_methods(tmp_path / "mine") as found:
        yield found


class TestScoresThatAreNoNumbers:
    def test_a_weight_score_names_method_and_matrix(self, author: Author) -> None:
        path = author.score(
            "nanny", "bad = math.nan if len(weight) == 32 else 1\nreturn weight.float().abs() * bad"
        )
        with pytest.raises(QualityError) as refused:
            decide("nanny")
        assert refused.value.message == f"nanny, {path}: {K}: 2,048 of 2,048 scores are NaN"
        assert "score()" in refused.value.hint

    def test_a_solver_is_named_with_the_matrices_that_it_had(self, author: Author) -> None:
        chosen = "mask_lowest(one.weight * math.nan, one.removed)"
        author.write("solving", f"{SOLVER}[PrunedMatrix({chosen}) for one in matrices]\n")
        with pytest.raises(
            QualityError, match=r"^solving: .*q_proj, .*v_proj: a score is NaN in rows 0 to 63"
        ):
            decide("solving")

    @pytest.mark.parametrize("budget", ["uniform", "global"])
    def test_a_structure_score(self, author: Author, budget: str) -> None:
        author.score("nan_units", "return weight.float().sum(dim=0) * math.nan", "structure")
        with pytest.raises(
            QualityError, match=rf"^nan_units, .*nan_units.py: {BLOCK}.*: 64 of 64 scores are NaN"
        ):
            decide("nan_units", budget=budget, sparsity=0.5)

    def test_a_structure_score_is_nothing_that_a_folder_is_written_of(
        self, author: Author, llama: Path, tmp_path: Path
    ) -> None:
        author.score("nan_folder", "return weight.float().sum(dim=0) * math.nan", "structure")
        with pytest.raises(QualityError):
            structprune.prune(llama, tmp_path / "out", "nan_folder", sparsity=0.5, **QUICK)
        assert not (tmp_path / "out").exists()

    def test_infinite_ones_are_ranked(self, author: Author) -> None:
        author.score("infinite", "return torch.where(weight > 0, math.inf, weight.float())")
        plan = decide("infinite", sparsity=0.25)
        assert plan.promises is not None and plan.promises.removed > 0

    def test_infinities_that_cancel_each_other_in_a_unit_are_not(self, author: Author) -> None:
        lines = "found = weight.float().sum(dim=0)\nfound[0], found[1] = math.inf, -math.inf\nreturn found"
        author.score("cancelling", lines, "structure")
        with pytest.raises(
            QualityError, match=rf"^cancelling, .*cancelling.py: {BLOCK}: kv_group: 1 of 2 scores are NaN"
        ):
            decide("cancelling", sparsity=0.5)

    def test_a_token_score(self, author: Author) -> None:
        author.score("nan_tokens", "return torch.full(seen.real.shape, math.nan)", "token")
        model, batch = vision_model("llava"), pictures("llava", 1).batch()
        refusal = pytest.raises(QualityError, match=r"^nan_tokens: a score of a visual token")
        with pruned(model, token_pruner("nan_tokens"), batch), refusal as refused:
            model(**batch)
        assert "the method itself" in refused.value.hint

    def test_a_score_of_depth(self) -> None:
        class Hollow(DepthPruner):
            def choose(self, units: Sequence[Any], *rest: Any) -> dict[Any, Verdict]:
                return {unit: Verdict(float("nan"), unit.block == 0) for unit in units}

        model = tiny("llama")
        with pytest.raises(QualityError, match=": the score of block 0 is NaN"):
            Hollow(sparsity=0.5).calibrate(model, [tokens(model)])

    @pytest.mark.parametrize("budget", ["uniform", "global"])
    def test_a_score_of_experts(self, budget: str) -> None:
        class Hollow(ExpertDrop):
            def score_experts(self, index: int, experts: int, seen: Statistics) -> torch.Tensor:
                return torch.full((experts,), torch.nan)

        model = tiny("mixtral")
        with pytest.raises(QualityError, match=rf": {BLOCK}\..*: 4 of 4 scores are NaN"):
            Hollow(sparsity=0.5, budget=budget).calibrate(model, [tokens(model)])


class TestScoresThatAreSomethingElse:
    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            ("return weight.float().T", "float32 of shape [64, 32]"),
            ("return None", "NoneType"),
            ("return weight.float().sum(dim=1)", "float32 of shape [32]"),
            ("return weight > 0", "bool of shape [32, 64]"),
        ],
        ids=["transposed", "nothing", "a vector", "no floats"],
    )
    def test_of_a_matrix(self, author: Author, answer: str, said: str) -> None:
        path = author.score("odd", f"if len(weight) == 32:\n    {answer}\nreturn weight.float()")
        with pytest.raises(MethodError) as refused:
            decide("odd")
        expected = f"odd, {path}: {K}: score() returned {said}, expected floats of shape [32, 64]"
        assert refused.value.message == expected
        assert refused.value.exit_code == 1 and "score()" in refused.value.hint

    def test_of_columns(self, author: Author) -> None:
        author.score("outputs", "return weight.float().sum(dim=1)", "structure")
        with pytest.raises(MethodError, match=r"down_proj: .*\[64\], expected floats of shape \[96\]"):
            decide("outputs", sparsity=0.5)

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            ("None", "returned NoneType, expected a mapping to Tensor with ['kv_group', 'channel']"),
            (
                "{'channel': torch.ones(96)}",
                "returned a mapping with ['channel'], expected a mapping to Tensor with",
            ),
            (
                "{kind: torch.ones(3) for kind in readers}",
                "kv_group: score_units() returned float32 of shape",
            ),
        ],
    )
    def test_of_units(self, author: Author, answer: str, said: str) -> None:
        body = f"def score_units(self, known, readers, seen):\n    return {answer}"
        path = author.derive("units", body, "structure")
        path.write_text(path.read_text().replace("_columns import ColumnPruner", "_width import WidthPruner"))
        with pytest.raises(MethodError) as refused:
            decide("units", sparsity=0.5)
        assert refused.value.message.startswith(f"units, {path}: {BLOCK}: ")
        assert said in refused.value.message

    def test_of_depth(self) -> None:
        class Odd(DepthPruner):
            def choose(self, units: Sequence[Any], *rest: Any) -> Any:
                return [*units]

        model = tiny("llama")
        with pytest.raises(MethodError, match=r"choose\(\) returned list, expected a mapping to Verdict"):
            Odd(sparsity=0.5).calibrate(model, [tokens(model)])

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            ("None", "v_proj: solve() returned NoneType, expected a list of one PrunedMatrix"),
            (
                "[PrunedMatrix(matrices[0].weight != 0)]",
                "v_proj: solve() returned 1 values, expected a list",
            ),
            (
                "[PrunedMatrix(one.weight.T != 0) for one in matrices]",
                "k_proj: solve() returned bool of shape",
            ),
        ],
    )
    def test_of_a_solver(self, author: Author, answer: str, said: str) -> None:
        author.write("solver", SOLVER + answer)
        with pytest.raises(MethodError, match=f"^solver: .*{re.escape(said)}"):
            decide("solver")

    def test_of_experts(self) -> None:
        class Short(ExpertDrop):
            def score_experts(self, index: int, experts: int, seen: Statistics) -> torch.Tensor:
                return torch.ones(1)

        model = tiny("mixtral")
        with pytest.raises(MethodError, match=r"score_experts\(\) returned .* \[1\], expected .* \[4\]"):
            Short(sparsity=0.5).calibrate(model, [tokens(model)])

    def test_of_a_choice_of_tokens(self, author: Author) -> None:
        author.derive("numbers", "def choose(self, seen, keep):\n    return keep", "token")
        path = author.folder / "token" / "numbers.py"
        path.write_text(path.read_text().replace("_scored import ScoredTokens", "_family import TokenPruner"))
        model, batch = vision_model("llava"), pictures("llava", 1).batch()
        refusal = pytest.raises(MethodError, match=r"^numbers: the visual tokens: choose\(\) returned int64")
        with pruned(model, token_pruner("numbers"), batch), refusal:
            model(**batch)

    def test_of_tokens(self, author: Author) -> None:
        author.score("flat", "return seen.features().mean(dim=(1, 2))", "token")
        model, batch = vision_model("llava"), pictures("llava", 1).batch()
        with (
            pruned(model, token_pruner("flat"), batch),
            pytest.raises(
                MethodError, match=r"^flat, .*flat.py: the visual tokens: score\(\) returned .* \[1\], exp"
            ),
        ):
            model(**batch)
