"""lm-eval tasks: run on a model in memory, refused in one line, and quiet beside what else is said."""

import json
import math
import signal
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from tqdm import tqdm

from structprune.errors import EnvironmentFailure, InputError, Interrupted, QualityError, UsageError
from structprune.evaluation.evaluation import evaluate
from structprune.evaluation.harness import _told_bars, harness
from structprune.models.opening import Opening
from structprune.models.streamed import open_model
from structprune.progress import silent
from structprune.recipe.options import EvaluateOptions
from tests.tiny import save_tiny, tiny, tokenizer


def test_lm_eval_tasks_stand_beside_the_dense_ones(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # It asks pip and the machine for their state, which takes seconds and goes into lm-eval's own JSON only.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    model, dense, ours = tiny("llama"), tiny("llama", seed=1), tokenizer()
    before = ours.backend_tokenizer.to_str()
    result = evaluate(
        model, ours, EvaluateOptions(tasks=["tiny_choice"], include_path=tasks, limit=4), dense=dense
    )
    told = json.loads(json.dumps(result.as_json(), allow_nan=False))
    figures = told["tasks"]["tiny_choice"]["acc"]
    assert set(figures) == {"model", "dense"}
    assert all(value in (0, 0.25, 0.5, 0.75, 1) for value in figures.values())
    assert told["protocol"]["tasks"]["tiny_choice"] == {
        "version": 1.0,
        "fewshot": 0,
        "samples": 4,
        "limit": 4,
    }
    assert capsys.readouterr().out == ""
    assert ours.backend_tokenizer.to_str() == before
    paths = result.save_harness(tmp_path / "not" / "yet")
    assert [path.name for path in paths] == ["lm_eval-model.json", "lm_eval-dense.json"]
    assert json.loads(paths[0].read_text())["results"]["tiny_choice"]["acc,none"] == figures["model"]


def test_lm_eval_of_a_model_whose_logits_are_nan_is_a_failure(tasks: Path) -> None:
    broken: Any = tiny("llama")
    broken.get_output_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(QualityError, match="lm-eval tasks tiny_choice: the logits hold NaN"):
        harness(broken, tokenizer(), ["tiny_choice"], include_path=tasks, limit=2)


def test_an_unknown_task_is_refused_with_the_nearest_name(
    tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # lm-eval's own list is not what is tested, and takes seconds to read.
    from lm_eval.tasks import TaskManager

    class Local(TaskManager):  # type: ignore[misc]
        def __init__(self, include_path: str, include_defaults: bool = False) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Local)
    with pytest.raises(UsageError, match=r"'tiny_chioce'.*did you mean tiny_choice\?"):
        harness(tiny("llama"), tokenizer(), ["tiny_chioce"], include_path=tasks)


def test_a_task_whose_data_cannot_be_had_is_one_line(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(path: str, *args: object, **options: object) -> None:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    task = (tasks / "tiny_choice.yaml").read_text().replace("tiny_choice", "far")
    task = "".join(line for line in task.splitlines(keepends=True) if not line.startswith("dataset_"))
    (tasks / "far.yaml").write_text(f"dataset_path: nobody/nothing\n{task}")
    with pytest.raises(EnvironmentFailure, match="nobody/nothing") as caught:
        harness(tiny("llama"), tokenizer(), ["far"], include_path=tasks)
    assert "\n" not in str(caught.value)


def test_a_damaged_task_file_is_refused_by_name(tasks: Path) -> None:
    task = (tasks / "tiny_choice.yaml").read_text().replace("tiny_choice", "odd")
    (tasks / "odd.yaml").write_text(task + "no_such_field: 1\n")
    with pytest.raises(InputError, match=r"tasks odd: cannot be set up.*no_such_field"):
        harness(tiny("llama"), tokenizer(), ["odd"], include_path=tasks)


def test_a_streamed_model_is_refused_by_lm_eval(tmp_path: Path) -> None:
    model = open_model(save_tiny("llama", tmp_path / "model"), Opening(stream=True))
    with pytest.raises(UsageError, match="need the whole model in memory"):
        harness(model, tokenizer(), ["tiny_choice"])


def test_git_is_not_asked_for_the_commit_of_the_folder(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object, **__: object) -> bytes:
        raise AssertionError("outside a repository git would complain on stderr")

    monkeypatch.setattr("lm_eval.loggers.utils.subprocess.check_output", asked)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    (tasks / ".git" / "refs").mkdir(parents=True)
    (tasks / ".git" / "HEAD").write_text("ref: refs/now\n")
    (tasks / ".git" / "refs" / "now").write_text("0123abc\n")
    monkeypatch.chdir(tasks)
    found = harness(tiny("llama"), tokenizer(), ["tiny_choice"], include_path=tasks, limit=1)
    assert found["git_hash"] == "0123abc"


def test_no_bar_is_drawn_and_all_are_again_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    with _told_bars(silent):
        assert list(tqdm(range(3), disable=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(tqdm(range(3))) == [0, 1, 2]
    assert "100%" in capsys.readouterr().err


def test_requests_are_told_one_by_one_and_a_signal_stops_between_them(tasks: Path) -> None:
    told: list[tuple[str, int, int]] = []
    run = partial(harness, tiny("llama"), tokenizer(), ["tiny_choice"], include_path=tasks, limit=3)
    run(progress=lambda *one: told.append(one))
    assert [stage for stage, *_ in told[:2]] == ["lm-eval, read tasks"] * 2
    del told[:2]
    assert len(told) > 1
    assert told == [("lm-eval, loglikelihood requests", done, len(told)) for done in range(1, len(told) + 1)]

    def stop(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(progress=stop)
    assert list(tqdm(range(3), disable=True)) == [0, 1, 2]
