"""Command lines under launchers: what is divided and gives one process's figures, and what is refused."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from structprune import meeting, ranks
from structprune.cli import main
from structprune.errors import EnvironmentFailure, QualityError
from structprune.evaluation.perplexity import score, windows_of
from structprune.machine import MEETING, PLACE, launch
from structprune.proof.fresh_process import child_environment
from structprune.ranks import Ranks, joined_ranks
from tests.conftest import Command
from tests.forks import ROOT, Around, Parent
from tests.seeing import save_rows
from tests.specimens import REPORT, TEXT
from tests.tiny import save_tiny, tiny

SINGLE = "calibration.batch_size=1"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, another one of its shapes, and a text."""
    folder = tmp_path_factory.mktemp("launched")
    for seed, name in enumerate(("model", "other")):
        save_tiny("llama", folder / name, seed=seed)
    (folder / "text.txt").write_text(TEXT)
    return folder


class TestEvaluate:
    @pytest.mark.parametrize("way", [[], ["--stream"]])
    def test_windows_of_several_give_the_figures_of_one(
        self, way: list[str], place: Path, parent: Parent
    ) -> None:
        # Five batches of two windows, the last one half empty, for three processes.
        words = ["evaluate", place / "model", "--compare", place / "other", "--text", place / "text.txt"]
        words += ["--length", 24, "--windows", 9, "--batch-size", 2, "--json", *way]

        one, three = parent.run(words, place), parent.launch([words] * 3, place)

        assert [ended.code for ended in three] == [0, 0, 0], [ended.err for ended in three]
        assert [ended.out for ended in three] == [one.out, "", ""]
        assert json.loads(one.out)["divergence"]["text"]["kl"] > 0
        assert not any(ended.err for ended in three[1:])

    def test_questions_of_several_give_the_figures_of_one(
        self, seeing: Path, tmp_path: Path, parent: Parent
    ) -> None:
        rows = save_rows(tmp_path / "rows")
        words = ["evaluate", seeing, "--compare", seeing, "--questions", rows, "--batch-size", 1, "--json"]

        one, two = parent.run(words, tmp_path), parent.launch([words] * 2, tmp_path)

        assert [ended.code for ended in two] == [0, 0], [ended.err for ended in two]
        assert two[0].out == one.out
        assert next(iter(json.loads(one.out)["questions"].values()))["asked"] > 2

    @pytest.mark.slow
    def test_lm_eval_runs_on_the_first_alone_and_says_so(
        self, place: Path, tasks: Path, parent: Parent
    ) -> None:
        words = ["evaluate", place / "model", "--tasks", "tiny_choice", "--include-path", tasks, "--json"]

        one, two = parent.run(words, place), parent.launch([words] * 2, place)

        assert [ended.code for ended in two] == [0, 0], [ended.err for ended in two]
        alone, shared = (json.loads(ended.out) for ended in (one, two[0]))
        assert alone["tasks"]["tiny_choice"] == shared["tasks"]["tiny_choice"]
        assert shared["protocol"]["flags"] == ["lm-eval runs on the first process alone"]
        assert "warning: lm-eval runs on the first process alone" in two[0].err
        assert two[1].err == ""

    def test_another_model_on_one_process_is_refused_and_said_once(self, place: Path, parent: Parent) -> None:
        lines = [["evaluate", place / name, "--text", place / "text.txt"] for name in ("model", "other")]

        ended = parent.launch(lines, place)

        assert [one.code for one in ended] == [3, 3]
        assert "error: rank 0: this evaluation: rank 1 differs from rank 0 in weights" in ended[0].err
        assert not ended[1].err

    def test_a_loss_that_is_not_finite_names_its_window_among_all(self) -> None:
        model = tiny("llama")
        text = windows_of(torch.arange(3, 63), 10)

        # As the second of two processes heard the first: its two windows, and then its own from the third on.
        class Heard(Ranks):
            def tell_each(self, said: Any = None, tensors: Any = None) -> list[tuple[Any, dict[str, Any]]]:
                first = {name: [2.0, 2.0, 2.0] if name in ("tokens", "model") else [] for name in said}
                return [(first, {}), (said, {})]

        with torch.no_grad():
            model.lm_head.weight[int(text.inputs[4, 5])] = math.nan
        with pytest.raises(QualityError, match="nan in window 3"):
            score(model, text, batch_size=1, ranks=Heard(1, 2))


class TestBadUse:
    def words(self, place: Path, output: Path, *more: object) -> list[object]:
        data = ["--calibration", place / "text.txt", "--length", 16, "--samples", 4, "--set", SINGLE]
        return ["prune", place / "model", output, "--method", "wanda", "--no-evaluate", *data, *more]

    @pytest.mark.parametrize(
        ("more", "code", "said", "hint"),
        [
            (
                ["--set", "calibration.batch_size=2"],
                2,
                "3 processes for 2 batches: each needs one",
                "batch_size=1",
            ),
            (["--device", "cuda:1"], 2, "device cuda:1: 3 processes were launched", "auto"),
            (["--sparsity", "0.5,0.6"], 2, "several goals are one process's work", "launcher"),
        ],
    )
    def test_what_all_find_is_said_once(
        self, more: list[object], code: int, said: str, hint: str, place: Path, tmp_path: Path, parent: Parent
    ) -> None:
        ended = parent.launch([self.words(place, tmp_path / "out", *more)] * 3, tmp_path)

        assert [one.code for one in ended] == [code] * 3, [one.err for one in ended]
        rows = [row for one in ended for row in one.err.splitlines() if row.startswith(("error: ", "hint: "))]
        assert [row.partition(":")[0] for row in rows] == ["error", "hint"]
        assert rows[0].startswith(f"error: rank 0: {said}")
        assert hint in rows[1]

    def test_a_rank_without_the_model_names_itself(self, place: Path, tmp_path: Path, parent: Parent) -> None:
        lines = [self.words(place, tmp_path / "out") for _ in range(3)]
        lines[1][1] = place / "nowhere"

        ended = parent.launch(lines, tmp_path)

        assert [one.code for one in ended] == [4, 3, 4], [one.err for one in ended]
        rows = [row for one in ended for row in one.err.splitlines() if row.startswith("error: ")]
        assert len(rows) == 1
        assert rows[0].startswith(f"error: rank 1: {place / 'nowhere'}")

    def test_a_model_that_nobody_has_is_said_once(self, place: Path, tmp_path: Path, parent: Parent) -> None:
        line = self.words(place, tmp_path / "out")
        line[1] = place / "nowhere"

        ended = parent.launch([line] * 3, tmp_path)

        assert [one.code for one in ended] == [3, 3, 3]
        assert [one.err.count("error: ") for one in ended] == [1, 0, 0]

    def test_a_model_that_one_rank_has_otherwise_is_refused(
        self, place: Path, tmp_path: Path, parent: Parent
    ) -> None:
        lines = [self.words(place, tmp_path / "out") for _ in range(2)]
        lines[1][1] = place / "other"

        ended = parent.launch(lines, tmp_path)

        assert [one.code for one in ended] == [3, 3], [one.err for one in ended]
        assert "rank 1 differs from rank 0 in" in ended[0].err
        assert not ended[1].err
        assert not (tmp_path / "out").exists()

    def test_data_that_one_rank_has_not_names_it(self, place: Path, tmp_path: Path, parent: Parent) -> None:
        other = place / "other.txt"
        other.write_text(TEXT[100:])
        lines = [self.words(place, tmp_path / "out") for _ in range(2)]
        lines[1][lines[1].index(place / "text.txt")] = other

        ended = parent.launch(lines, tmp_path)

        assert [one.code for one in ended] == [3, 3]
        assert "rank 0: this run: rank 1 differs from rank 0 in calibration" in ended[0].err
        assert not ended[1].err

    @pytest.mark.parametrize(("patch", "said"), [("another_version", "versions"), ("two_threads", "threads")])
    def test_what_one_rank_has_otherwise_is_named(
        self, patch: str, said: str, place: Path, tmp_path: Path, parent: Parent
    ) -> None:
        other = {1: Around(patch=f"stand_ins:{patch}")}

        ended = parent.launch([self.words(place, tmp_path / "out")] * 2, tmp_path, other)

        assert [one.code for one in ended] == [3, 3], [one.err for one in ended]
        assert f"rank 0: this run: rank 1 differs from rank 0 in {said}" in ended[0].err
        assert not ended[1].err

    def test_other_ranks_and_threads_are_named_where_a_run_resumes(
        self, place: Path, tmp_path: Path, parent: Parent
    ) -> None:
        words = self.words(place, tmp_path / "out")
        killed = Around(patch="stand_ins:killed_at_a_block")
        threads = Around(patch="stand_ins:two_threads")

        assert parent.launch([words] * 2, tmp_path, {0: killed})[0].code == -9
        more = parent.launch([words] * 3, tmp_path)
        wider = parent.launch([words] * 2, tmp_path, {0: threads, 1: threads})

        for said, ended in (("ranks", more), ("threads", wider)):
            assert {one.code for one in ended} == {4}, [one.err for one in ended]
            assert f"an interrupted run differs in {said}" in ended[0].err
            assert not any("error" in one.err for one in ended[1:])


class TestMeeting:
    @pytest.fixture(autouse=True)
    def variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in zip((*PLACE, *MEETING), ("1", "2", "1", "2", "127.0.0.1", "1"), strict=True):
            monkeypatch.setenv(name, value)

    @pytest.mark.parametrize("name", [*PLACE[2:], *MEETING])
    def test_what_no_launcher_told_is_named(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(name)
        with pytest.raises(EnvironmentFailure, match=f"RANK is 1 of WORLD_SIZE 2, and {name} not set"):
            joined_ranks().__enter__()

    def test_a_rank_beyond_the_last_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "2")
        with pytest.raises(EnvironmentFailure, match="RANK is 2 of WORLD_SIZE 2"):
            joined_ranks().__enter__()

    def test_where_nobody_answers_the_search_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(meeting, "PATIENCE_TO_MEET", meeting.timedelta(seconds=1))
        with pytest.raises(EnvironmentFailure, match="the 2 processes of this run do not find each other"):
            joined_ranks().__enter__()

    def test_who_did_not_come_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = torch.distributed.HashStore()
        monkeypatch.setattr(meeting, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
        monkeypatch.setattr(meeting, "PATIENCE_TO_MEET", meeting.timedelta(seconds=1))
        with pytest.raises(EnvironmentFailure, match="rank 0 did not come"):
            joined_ranks().__enter__()

    def test_the_command_line_gives_four(
        self, command: Command, monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.delenv("MASTER_ADDR")
        ended = command("prune", place / "model", tmp_path / "out", "--method", "magnitude")
        assert ended.code == 4
        assert "error: rank 0: RANK is 0 of WORLD_SIZE 2, and MASTER_ADDR not set" in ended.err


@pytest.mark.parametrize("words", [[], ["prune"], ["recover"], ["evaluate"]])
def test_help_shows_the_launch_line(words: list[str], command: Command) -> None:
    said = " ".join(command(*words, "--help").out.split())
    assert f"torchrun --nproc-per-node N -m structprune {(words or ['prune'])[0]} ..." in said


class TestLaunchers:
    def words(self, place: Path, output: Path) -> list[str]:
        data = ["--calibration", place / "text.txt", "--length", 16, "--samples", 6, "--set", SINGLE]
        evaluation = {"text": place / "text.txt", "length": 16, "windows": 5, "batch_size": 2}
        sets = [word for key, value in evaluation.items() for word in ("--set", f"evaluate.{key}={value}")]
        words = ["prune", place / "model", output, "--method", "wanda", "--json", *data, *sets]
        return [str(word) for word in words]

    def test_what_several_prune_they_measure_as_one(
        self, place: Path, tmp_path: Path, parent: Parent
    ) -> None:
        two = parent.launch([self.words(place, tmp_path / "two")] * 2, tmp_path)
        assert [ended.code for ended in two] == [0, 0], [ended.err for ended in two]
        assert two[1].out == two[1].err == ""
        one = parent.run(self.words(place, tmp_path / "one"), tmp_path)
        reports = [json.loads((tmp_path / name / REPORT).read_text()) for name in ("one", "two")]
        assert one.code == 0
        assert reports[0]["evaluation"] == reports[1]["evaluation"]
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
        assert weights[0] == weights[1]

    def test_another_exam_on_one_process_is_refused(
        self, place: Path, tmp_path: Path, parent: Parent
    ) -> None:
        words = self.words(place, tmp_path / "out")
        ended = parent.launch([words, [*words, "--no-evaluate"]], tmp_path)
        assert [one.code for one in ended] == [3, 3]
        assert "rank 1 differs from rank 0 in evaluate" in ended[0].err

    @pytest.mark.slow
    def test_two_launchers_write_what_one_process_does(self, place: Path, tmp_path: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        begun = []
        for number in range(2):
            there = ["--nnodes", 2, "--node-rank", number, "--master-addr", "127.0.0.1"]
            launcher = ["torch.distributed.run", *there, "--master-port", port, "--nproc-per-node", 1]
            words = [*launcher, "-m", "structprune", *self.words(place, tmp_path / "two")]
            begun.append(start("-m", *words))
        ended = [one.communicate(timeout=300) for one in begun]
        assert [one.returncode for one in begun] == [0, 0], ended
        assert json.loads(ended[0][0])["status"] == "ok"
        assert ended[1][0] == ""
        assert main(self.words(place, tmp_path / "one")) == 0
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
        assert weights[0] == weights[1]

    @pytest.mark.slow
    @pytest.mark.parametrize("way", ["flags", "file"])
    def test_accelerate_starts_one_process_on_a_cpu(self, way: str, place: Path, tmp_path: Path) -> None:
        """Whatever is asked of it; and it sets neither RANK nor WORLD_SIZE, though MASTER_ADDR."""
        file = tmp_path / "accelerate.yaml"
        file.write_text(
            "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nmixed_precision: bf16\n"
            "num_machines: 1\nnum_processes: 2\nmachine_rank: 0\nuse_cpu: true\n"
        )
        told = ["--cpu", "--num_processes", 2] if way == "flags" else ["--config_file", file]
        words = [
            "accelerate.commands.launch",
            *told,
            "-m",
            "structprune",
            *self.words(place, tmp_path / "out"),
        ]
        launched = start("-m", *words)
        said, errors = launched.communicate(timeout=300)
        assert launched.returncode == 0, errors
        assert json.loads(said)["status"] == "ok"
        assert main(self.words(place, tmp_path / "one")) == 0
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "out")]
        assert weights[0] == weights[1]

    def test_what_accelerate_tells_is_no_launch_and_for_no_child(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_VERSION": "2"}
        for name, value in {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
            monkeypatch.setenv(name, value)
        assert launch().count == 1
        assert not told.keys() & child_environment(ours=True).keys()

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_launcher_that_is_stopped_ends_all_silently(
        self, number: int, place: Path, tmp_path: Path
    ) -> None:
        words = [one.replace("text.txt", "long.txt") for one in self.words(place, tmp_path / "out")]
        words[words.index("6")] = "6000"
        (place / "long.txt").write_text(TEXT * 100)
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2]
        launched = start("-m", *launcher, "-m", "structprune", *words)
        while not [*tmp_path.glob("out.partial-*/structprune/plans")]:
            assert launched.poll() is None
            time.sleep(0.05)
        launched.send_signal(number)
        before = time.monotonic()
        _, errors = launched.communicate(timeout=120)
        assert launched.returncode not in (0, None)
        assert time.monotonic() - before < 60
        assert "error: " not in errors


def start(*words: object) -> "subprocess.Popen[str]":
    """Start Python."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_portions_are_neighbours_and_leave_nothing_out() -> None:
    for count in range(12):
        parts = [[*Ranks(number, 5).portion(count)] for number in range(5)]
        assert [one for part in parts for one in part] == [*range(count)]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert ranks.Ranks().portion(3) == range(3)
