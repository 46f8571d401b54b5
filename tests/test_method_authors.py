"""Whoever writes a method of their own is told what is wrong with it: which file, and what was expected."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import structprune
from structprune.calibration.statistics import InputSums, Part, Statistics
from structprune.errors import EnvironmentFailure, Interrupted, MethodError, UsageError
from structprune.pruners.catalogue import find, names
from structprune.recipe.recipe import Recipe, choose_recipe
from tests.authors import Author, decide, writing_methods
from tests.conftest import Command
from tests.methods import QUICK
from tests.oracle import pictures, vision_model


@pytest.fixture
def author(tmp_path: Path) -> Iterator[Author]:
    with writing_methods(tmp_path / "mine") as found:
        yield found


def stop_at_the_second_block(stage: str, done: int, total: int) -> None:
    if "mended" in stage and done == 1:
        raise Interrupted(signal.SIGTERM)


class TestMistakesInTheFile:
    @pytest.mark.parametrize(
        ("answer", "parts", "said"),
        [
            ("raise ValueError('oops')", "", "ValueError: oops"),
            (
                "return seen.mean * weight",
                "'norm'",
                "LookupError: 'moments' was not collected, only ['norm']",
            ),
            ("return torch.nn.functional.linear(weight, weight[:1, :3])", "", "RuntimeError: "),
        ],
        ids=["raised", "not declared", "inside torch"],
    )
    def test_the_command_line_names_method_file_and_line_and_keeps_the_traceback(
        self,
        author: Author,
        llama: Path,
        tmp_path: Path,
        command: Command,
        capsys: pytest.CaptureFixture[str],
        answer: str,
        parts: str,
        said: str,
    ) -> None:
        path = author.score("stumbling", answer, parts=parts)
        line = path.read_text().splitlines().index(f"        {answer}") + 1
        text = QUICK["calibration"]["source"]
        words = ["prune", llama, tmp_path / "out", "--method", "stumbling", "--calibration", text]
        with pytest.raises((ValueError, LookupError, RuntimeError)):
            command(*words, "--samples", "4", "--length", "16", "--json")
        out, err = capsys.readouterr()
        error = json.loads(out)["error"]
        assert error["message"].startswith(f"stumbling, {path}:{line}: {said}")
        assert json.loads(out)["code"] == 1 and error["kind"] == "method"
        assert "a bug in structprune" not in err

    def test_an_unfinished_class_is_refused_by_its_name_and_hides_no_other(
        self, author: Author, llama: Path, command: Command
    ) -> None:
        path = author.derive("unfinished", "pass")
        with pytest.raises(MethodError, match=rf"^{path}: Mine lacks score\(\)"):
            find("unfinished")
        rows = {row["name"]: row["reason"] for row in structprune.inspect(str(llama))["methods"]}
        assert "Mine lacks score()" in rows["unfinished"] and rows["wanda"] is None
        assert command("methods").code == command("inspect", llama).code == 0

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("class Mine(:\n", "halfway, {}:1: SyntaxError: "),
            ("\nfrom structprune.nowhere import Thing\n", "halfway, {}:2: ModuleNotFoundError: "),
            ("X = 1\n", "{}: holds no method"),
        ],
    )
    def test_so_is_a_file_that_cannot_be_imported(
        self, author: Author, llama: Path, command: Command, text: str, said: str
    ) -> None:
        path = author.write("halfway", text)
        with pytest.raises(MethodError) as refused:
            find("halfway")
        assert refused.value.message.startswith(said.format(path))
        rows = {row["name"]: row["reason"] for row in structprune.inspect(str(llama))["methods"]}
        assert rows["halfway"] == refused.value.message and rows["wanda"] is None
        assert command("methods").code == 0

    def test_a_method_that_must_be_told_something_is_listed(self, author: Author, llama: Path) -> None:
        author.derive("needy", "power: float\ndef score(self, weight, seen):\n    return weight.float()")
        rows = {row["name"]: row["reason"] for row in structprune.inspect(str(llama))["methods"]}
        assert "power" in rows["needy"] and rows["wanda"] is None

    def test_of_several_classes_the_finished_one_is_meant(self, author: Author) -> None:
        path = author.score("finished", "return weight.float()")
        path.write_text(path.read_text() + "\n\nclass Above(Family):\n    pass\n")
        assert find("finished").__name__ == "Mine"

    def test_a_name_that_is_taken_blocks_that_name_alone(
        self, author: Author, llama: Path, command: Command
    ) -> None:
        path = author.score("wanda", "return weight.float()")
        with pytest.raises(UsageError, match="two files are called 'wanda'") as refused:
            find("wanda")
        assert str(path) in refused.value.message
        assert find("magnitude").method() == "magnitude" and "wanda" in names()
        rows = {row["name"]: row["reason"] for row in structprune.inspect(str(llama))["methods"]}
        assert rows["wanda"] == refused.value.message and rows["magnitude"] is None
        assert command("methods").code == 0


class TestFilesOutside:
    """What is told of a method whose file is none of the package's."""

    def test_an_answer_of_another_shape_names_the_file(self, author: Author) -> None:
        path = author.score("short", "return weight[0].float()")
        with pytest.raises(MethodError) as caught:
            decide("short")
        assert caught.value.message.startswith(f"short, {path}: model.layers.0.")

    @pytest.mark.parametrize("family", ["weight", "structure"])
    def test_a_score_that_writes_into_the_weight_is_refused(self, author: Author, family: str) -> None:
        path = author.score("writing", "weight.abs_()\nreturn weight.float()", family, parts="'norm'")
        with pytest.raises(MethodError, match="changed the weight that it was given") as caught:
            decide("writing")
        assert caught.value.message.startswith(f"writing, {path}: model.layers.0.")

    def test_one_that_was_mended_resumes_nothing_that_it_decided_before(
        self, author: Author, llama: Path, tmp_path: Path
    ) -> None:
        def run(**more: Any) -> dict[str, Any]:
            recipe = {"model": str(llama), "output": str(tmp_path / "out"), "evaluate": False}
            recipe |= {"calibration": QUICK["calibration"], "prune": "mended"}
            return structprune.prune(Recipe.model_validate(recipe), **more)

        author.score("mended", "return weight.float().abs()")
        with pytest.raises(Interrupted):
            run(progress=stop_at_the_second_block)
        author.score("mended", "return -weight.float().abs()")
        with pytest.raises(EnvironmentFailure, match=r"an interrupted run differs in methods") as caught:
            run()
        assert "restart" in caught.value.hint

    def test_the_command_line_finds_it_in_a_folder_that_the_environment_names(
        self, llama: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        words = ["prune", llama, tmp_path / "out", "--method", "named", "--no-evaluate"]
        failed = command(*words)
        assert failed.code == 2
        assert "STRUCTPRUNE_METHODS=FOLDER, which holds it as FOLDER/weight/named.py" in failed.err
        author = Author(tmp_path / "own")
        author.score("named", "return weight.float().abs()", parts="'norm'")
        monkeypatch.setenv("STRUCTPRUNE_METHODS", f"{tmp_path / 'none'}:{author.folder}")
        text = QUICK["calibration"]["source"]
        done = command(*words, "--calibration", text, "--samples", "4", "--length", "16")
        assert done.code == 0, done.err
        assert "named" in command("methods").out
        applied = command("apply", llama, tmp_path / "again", "--plan", tmp_path / "out")
        assert applied.code == 0, applied.err
        files = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
        assert files[0].read_bytes() == files[1].read_bytes()


class TestParts:
    @pytest.mark.parametrize("family", ["weight", "structure"])
    def test_one_that_does_not_exist_is_refused_by_its_name_before_any_work(
        self, author: Author, family: str
    ) -> None:
        author.score("greatest", "return weight.float()", family, parts="'max', 'norm'")
        with pytest.raises(MethodError, match="greatest: parts: calibration remembers no 'max'") as refused:
            choose_recipe("demo", flags={"output": "out", "prune.method": "greatest"})
        assert refused.value.hint.startswith("one of: norm, moments, gram, gradient,")

    @pytest.mark.parametrize("part", ["gradient", "gradient_l1", "gradient_l2"])
    def test_every_gradient_is_what_it_says(self, author: Author, part: Part) -> None:
        said = "bool((seen.gradient < 0).any())"
        lines = f"assert {said} == {part == 'gradient'}\nreturn weight.float().abs() * seen.gradient"
        author.score(f"by_{part}", lines, parts=repr(part))
        decide(f"by_{part}")

    def test_two_gradients_are_one_too_many(self, author: Author) -> None:
        author.score("twice", "return weight.float()", parts="'gradient', 'gradient_l1'")
        with pytest.raises(MethodError, match="twice: parts: 2 means of the gradient"):
            decide("twice")

    def test_a_gradient_that_nobody_declared_names_those_that_one_can_declare(self) -> None:
        seen = Statistics(InputSums(frozenset({"norm"}), 4, torch.device("cpu")))
        with pytest.raises(LookupError, match="'gradient', 'gradient_l1', 'gradient_l2'"):
            _ = seen.gradient


class TestMethodsThatWorkWhileAModelRuns:
    def test_in_a_folder_that_only_this_process_knows_they_write_nothing(self, author: Author) -> None:
        path = author.score("elsewhere", "return seen.features().sum(dim=2)", "token")
        with pytest.raises(UsageError) as refused:
            choose_recipe("demo-vision", flags={"output": "out", "prune.method": "elsewhere"})
        assert refused.value.message.startswith(f"{path}: elsewhere works while a model runs")
        assert "structprune/pruners/token/" in refused.value.hint

    def test_in_memory_they_run(self, author: Author) -> None:
        author.score("in_memory", "return seen.features().sum(dim=2)", "token")
        model, batch = vision_model("llava"), pictures("llava", 1).batch()
        with structprune.pruning(model, "in_memory"):
            model(**batch)

    def test_an_earlier_decision_is_not_carried_out_either(
        self, author: Author, seeing: Path, tmp_path: Path
    ) -> None:
        author.score("planned", "return seen.features().sum(dim=2)", "token")
        model, _ = structprune.load(str(seeing))
        pruner = find("planned")()
        writer = pruner.writer(tmp_path / "plan", model, "0" * 64)
        pruner.calibrate(model, [], writer)
        with pytest.raises(UsageError, match="planned works while a model runs"):
            structprune.apply(str(seeing), tmp_path / "out", tmp_path / "plan")
        assert not (tmp_path / "out").exists()
