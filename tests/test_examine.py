"""What a run measures its result on: chosen and checked before anything is computed."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import structprune
from structprune.calibration.data import LEFT_WINDOWS, READ_AHEAD, Calibration, cut, encode, load, pieces
from structprune.calibration.text_source import TextSource
from structprune.checkpoint.writing import Writing
from structprune.errors import StructpruneError
from structprune.evaluation import memory as memory_module
from structprune.evaluation.evaluation import evaluate
from structprune.evaluation.exam import exam_on_left, read_exam
from structprune.evaluation.memory import Memory
from structprune.models import walk
from structprune.models.opening import Opening
from structprune.models.streamed import open_model
from structprune.recipe.options import EvaluateOptions
from tests.conftest import Command
from tests.methods import CALIBRATION, TEXT
from tests.tiny import save_tiny, tiny, tokenizer

FILES_ONLY = Writing(reload=False)
LENGTH = 16
UNKNOWN_TASK = {"text": TEXT, "tasks": ["no_such_task"]}


def text_of(windows: int, folder: Path, length: int = LENGTH) -> TextSource:
    """Return a text of so many windows; no two are alike."""
    path = folder / f"{windows}.txt"
    path.write_text("".join(f"{number:05d} " for number in range(windows * length)))
    ids = encode(pieces(TextSource(str(path))), tokenizer())
    words = tokenizer().decode(ids[: windows * length])
    path.write_text(words)
    return TextSource(str(path))


def drawn(text: TextSource, seed: int, samples: int = 2) -> Calibration:
    return load(text, tokenizer(), samples=samples, length=LENGTH, seed=seed, batch_size=samples)


def rows(ids: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in ids.tolist()}


class TestWhatIsLeft:
    @pytest.mark.parametrize("windows", [5, 33, 200])
    def test_the_draws_are_what_they_were(self, windows: int, tmp_path: Path) -> None:
        text = text_of(windows, tmp_path)
        ids = encode(pieces(text), tokenizer(), limit=2 * LENGTH * READ_AHEAD)
        whole = cut(ids, LENGTH)
        expected = whole[random.Random(7).sample(range(len(whole)), 2)]
        found = drawn(text, 7)
        assert torch.equal(found.batches[0]["input_ids"], expected)
        assert found.facts["tokens_available"] == ids.numel()

    def test_a_long_text_leaves_the_same_windows_for_every_seed(self, tmp_path: Path) -> None:
        text = text_of(2 * READ_AHEAD + 20, tmp_path)
        left = [drawn(text, seed).left.inputs for seed in range(6)]
        whole = cut(encode(pieces(text), tokenizer()), LENGTH)
        assert torch.equal(left[0], whole[2 * READ_AHEAD : 2 * READ_AHEAD + LEFT_WINDOWS])
        assert all(torch.equal(left[0], other) for other in left[1:])

    def test_a_short_text_leaves_the_last_that_were_not_drawn(self, tmp_path: Path) -> None:
        text = text_of(12, tmp_path)
        whole = cut(encode(pieces(text), tokenizer()), LENGTH)
        for seed in range(6):
            found = drawn(text, seed, samples=3)
            taken = rows(found.batches[0]["input_ids"])
            expected = [row for row in whole.tolist() if tuple(row) not in taken][-LEFT_WINDOWS:]
            assert found.left.inputs.tolist() == expected

    def test_where_all_is_drawn_nothing_is_left_and_the_exam_says_so(self, tmp_path: Path) -> None:
        left = drawn(text_of(3, tmp_path), 0, samples=3).left
        assert not len(left.inputs)
        exam = exam_on_left(EvaluateOptions(), left, tokenizer(), tiny("llama").config)
        assert exam.texts == () and "nothing of 3 was left" in exam.reason


class TestTheDefaultOfARun:
    @pytest.mark.parametrize("stream", [False, True])
    def test_it_measures_on_what_calibration_left(self, stream: bool, llama: Path, tmp_path: Path) -> None:
        report = structprune.prune(
            llama, tmp_path / "out", "wanda", calibration=CALIBRATION, writing=FILES_ONLY,
            opening=Opening(stream=stream),
        )  # fmt: skip
        ((name, stamp),) = report["evaluation"]["protocol"]["texts"].items()
        assert name == Path(TEXT).stem
        assert (stamp["windows"], stamp["length"]) == (LEFT_WINDOWS, CALIBRATION["length"])
        assert report["evaluation"]["perplexity"][name]["dense"] > 1
        assert bool(report["evaluation"]["generations"]) is False or not stream

    def test_a_method_without_data_measures_nothing_and_says_why(
        self, command: Command, llama: Path, tmp_path: Path
    ) -> None:
        done = command("prune", llama, tmp_path / "out", "--method", "magnitude")
        assert done.code == 0
        assert "no perplexity was measured: the run looked at no data" in done.out
        assert "no perplexity was measured" in (tmp_path / "out" / "README.md").read_text()

    def test_the_demo_is_measured_on_text_of_its_world(self, tmp_path: Path) -> None:
        report = structprune.prune(
            "demo", tmp_path / "out", "wanda", calibration={"samples": 2, "length": 32}, writing=FILES_ONLY
        )
        assert report["evaluation"]["protocol"]["texts"]["demo"]["windows"] == 8
        assert report["evaluation"]["perplexity"]["demo"]["dense"] < 2.5

    def test_evaluate_makes_no_continuations_which_it_never_shows(
        self, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Whoever calls it fails.
        monkeypatch.setattr("structprune.evaluation.evaluation.generations", None)
        options = EvaluateOptions(text=(TEXT,), windows=1, length=16, generations=True, compare=str(llama))
        found = structprune.evaluate(str(llama), options)
        assert found["perplexity"] and "generations" not in found

    @pytest.mark.parametrize("asked", [{"skip": True}, False])
    def test_an_evaluation_that_is_not_wanted_is_left_out(
        self, asked: Any, llama: Path, tmp_path: Path
    ) -> None:
        report = structprune.prune(
            llama, tmp_path / "out", "wanda", calibration=CALIBRATION, evaluate=asked, writing=FILES_ONLY
        )
        assert report["evaluation"]["perplexity"] == {}
        assert report["evaluation"]["protocol"]["flags"] == [
            "nothing was measured: no evaluation was asked for"
        ]

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (("--max-ppl-ratio", "1.5"), "needs a text"),
            (("--max-ppl-ratio", "1.5", "--no-evaluate"), "needs an evaluation"),
            (("--max-ppl-ratio", "1.5", "--no-evaluate", "--set", f"evaluate.text={TEXT}"), "needs an eval"),
        ],
    )
    def test_a_gate_needs_a_text_of_its_own(
        self, flags: tuple[str, ...], said: str, command: Command, llama: Path, tmp_path: Path
    ) -> None:
        done = command("prune", llama, tmp_path / "out", "--method", "magnitude", *flags)
        assert done.code == 2 and said in done.err

    def test_evaluate_refuses_a_gate_with_nothing_to_compare(self, command: Command, llama: Path) -> None:
        done = command("evaluate", llama, "--text", TEXT, "--max-ppl-ratio", "2")
        assert done.code == 2 and "--compare" in done.err


class TestBeforeAnythingIsComputed:
    @pytest.mark.parametrize(
        ("evaluation", "code", "said", "dry"),
        [
            ({"text": "nowhere.txt"}, 3, "nowhere.txt: no such file", False),
            ({"text": "nowhere.txt"}, 3, "nowhere.txt: no such file", True),
            ({"text": TEXT, "length": 4096}, 2, "max_position_embeddings", False),
            ({"text": TEXT, "length": 4096}, 2, "max_position_embeddings", True),
            (UNKNOWN_TASK, 2, "does not know the task 'no_such_task'", False),
            # lm-eval reads thousands of files to find that it does not know it.
            pytest.param(
                UNKNOWN_TASK, 2, "does not know the task 'no_such_task'", True, marks=pytest.mark.slow
            ),
        ],
    )
    def test_an_evaluation_that_must_fail_is_refused(
        self,
        evaluation: dict[str, Any],
        code: int,
        said: str,
        dry: bool,
        llama: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if "tasks" in evaluation:
            pytest.importorskip("lm_eval")
        recipe = structprune.Recipe.model_validate(
            {"model": str(llama), "output": tmp_path / "out", "prune": {"method": "wanda"}}
            | {"calibration": CALIBRATION, "evaluate": evaluation}
        )
        refuse_walks(monkeypatch)
        with pytest.raises(StructpruneError, match=said) as caught:
            structprune.dry_run(recipe) if dry else structprune.prune(recipe)
        assert caught.value.exit_code == code
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("command_", ["prune", "sweep", "dry run", "apply", "recover"])
    @pytest.mark.parametrize("odd", ["pipe", "link"])
    def test_a_side_file_that_cannot_be_copied_is_refused(
        self, odd: str, command_: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, out = save_tiny("llama", tmp_path / "model"), tmp_path / "out"
        if odd == "pipe":
            os.mkfifo(model / "notes.txt")
        else:
            (tmp_path / "elsewhere.txt").write_text("not yours")
            (model / "notes.txt").symlink_to(tmp_path / "elsewhere.txt")
        recipe = structprune.Recipe.model_validate(
            {"model": str(model), "output": out, "prune": {"method": "magnitude"}}
        )
        runs = {
            "prune": lambda: structprune.prune(recipe),
            "sweep": lambda: structprune.prune_each(recipe, [0.3, 0.5]),
            "dry run": lambda: structprune.dry_run(recipe),
            "apply": lambda: structprune.apply(str(model), out, llama),
            "recover": lambda: structprune.recover(str(model), out),
        }
        refuse_walks(monkeypatch)
        with pytest.raises(StructpruneError, match=r"notes\.txt") as caught:
            runs[command_]()
        assert caught.value.exit_code == 3 and not out.exists()

    def test_a_tokenizer_that_knows_more_than_the_model_is_found_though_the_method_reads_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = save_tiny("llama", tmp_path / "model")
        more = tokenizer()
        more.add_tokens([f"word{number}" for number in range(500)])
        more.save_pretrained(model)
        refuse_walks(monkeypatch)
        for run in (structprune.prune, structprune.dry_run):
            recipe = structprune.Recipe.model_validate(
                {"model": str(model), "output": tmp_path / "out", "prune": {"method": "magnitude"}}
                | {"evaluate": {"text": TEXT}}
            )
            with pytest.raises(StructpruneError, match="the tokenizer has ids up to"):
                run(recipe)
        assert not (tmp_path / "out").exists()


class TestTheDenseModelOfASweep:
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_memory_gives_the_figures_of_asking_again(
        self, stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folders = [save_tiny("llama", tmp_path / str(seed), seed=seed) for seed in (0, 1)]
        model, dense = (open_model(folder, Opening(stream=stream)) for folder in folders)
        exam = read_exam(
            EvaluateOptions(text=[TEXT], length=16, windows=5, batch_size=2), tokenizer(), dense.config
        )
        plain = evaluate(model, tokenizer(), exam, dense=dense)
        with Memory() as memory:
            evaluate(model, tokenizer(), exam, dense=dense, memory=memory)
            monkeypatch.setattr(memory_module, "outputs", None)
            again = evaluate(
                model, tokenizer(), exam, dense=open_model(folders[1], Opening(stream=stream)), memory=memory
            )
        assert again.as_json() == plain.as_json() and again.generations == plain.generations

    @pytest.mark.parametrize("method", ["nowag", "wanda"])
    def test_it_is_asked_once_for_all_goals(
        self, method: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[int] = []
        real = memory_module.outputs

        def count(model: Any, batches: Any) -> Any:
            asked.append(len(batches))
            return real(model, batches)

        monkeypatch.setattr(memory_module, "outputs", count)
        recipe = structprune.Recipe.model_validate(
            {"model": str(llama), "output": tmp_path / "sw", "prune": {"method": method}}
            | {"calibration": CALIBRATION, "evaluate": {"generations": False}}
        )
        runs = structprune.prune_each(recipe, [0.3, 0.5, 0.6], writing=FILES_ONLY)["runs"]
        dense = [run["evaluation"]["perplexity"][Path(TEXT).stem]["dense"] for run in runs.values()]
        assert asked == [1] and len(set(dense)) == 1


def refuse_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any step through a model's blocks fail the test."""

    def walked(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(walk.Walk, "__init__", walked)
