"""Every row of the table of events, R1 to R7, through the real command line, once each."""

import http.server
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.forks import ROOT, VARIABLES, Around, Parent, Stop
from tests.specimens import stamps
from tests.stories import STORIES, Place, undisturbed

TOKEN = "hf_ThisIsASecretToken"


@pytest.fixture
def place(specimens: Path, tmp_path: Path) -> Place:
    return Place.furnish(tmp_path / "place", STORIES["prune"], specimens)


def test_r1_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(
    place: Place, parent: Parent, tmp_path: Path
) -> None:
    ended, right = undisturbed(parent, tmp_path / "undisturbed", place.story, place.specimens)
    # In the second block: the first is whole on the disk.
    second = next(number for number, call in enumerate(ended.calls, start=1) if "block-0001" in call)
    assert parent.run(place.words, place.folder, Stop("call", second)).code == -signal.SIGKILL
    again = parent.run(place.words, place.folder)
    assert place.wrong_after(again, right) == []
    assert '"blocks_resumed": 1' in again.out


def test_r2_killed_between_the_last_renames_either_result_is_whole(
    specimens: Path, parent: Parent, tmp_path: Path
) -> None:
    story = STORIES["prune in place of a former result"]
    ended, right = undisturbed(parent, tmp_path / "undisturbed", story, specimens)
    renames = [number for number, call in enumerate(ended.calls, 1) if call.startswith("rename /out")]
    last = [number for number in renames if ".partial-" not in ended.calls[number - 1]]
    assert len(last) >= 2
    for number in (*last, *(one + 1 for one in last)):
        place = Place.furnish(tmp_path / str(number), story, specimens)
        assert parent.run(place.words, place.folder, Stop("call", number)).code == -signal.SIGKILL
        assert place.wrong_with_output(right) == []
        assert place.wrong_after(parent.run(place.words, place.folder), right) == []


@pytest.mark.slow
def test_r3_a_second_run_is_told_who_has_the_output(place: Place, parent: Parent) -> None:
    with Parent() as other:
        other.start(place.words, place.folder, around=Around(patch="stand_ins:run_that_lasts"))
        lock = place.folder / "out.lock"
        while not lock.exists() or not lock.read_text():
            assert other.is_running
        second = parent.run(place.words, place.folder)
        assert second.code == 4
        assert "locked by pid" in second.error["message"]
        assert " on " in second.error["message"]
        assert " since 20" in second.error["message"]
        assert other.finish().code == 0
    assert parent.run([*place.words, "--overwrite"], place.folder).code == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--sparsity", "0.25"], "differs in prune"),
        (["--seed", "7"], "calibration.seed"),
        (["--samples", "3"], "calibration.samples"),
    ],
)
def test_r4_another_run_for_the_same_output_is_told_what_differs(
    change: list[str], said: str, place: Place, parent: Parent
) -> None:
    assert parent.run(place.words, place.folder, Stop("line", 3)).code == -signal.SIGKILL
    other = parent.run([*place.words, *change], place.folder)
    assert (other.code, said in other.err) == (4, True), other.err
    assert "--restart" in other.error["hint"]
    assert parent.run([*place.words, *change, "--restart"], place.folder).code == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_r5_a_signal_stops_the_run_and_the_same_command_ends_it(
    number: int, code: int, place: Place, parent: Parent, tmp_path: Path
) -> None:
    _, right = undisturbed(parent, tmp_path / "undisturbed", place.story, place.specimens)
    stopped = parent.run(place.words, place.folder, around=Around(signal=number))
    assert stopped.code == code, stopped.err
    assert stopped.error["kind"] == "interrupted"
    assert "same command" in stopped.error["hint"]
    assert place.wrong_after(parent.run(place.words, place.folder), right) == []


def test_r6_clocks_and_terminals_of_all_kinds_change_nothing(
    place: Place, parent: Parent, tmp_path: Path
) -> None:
    _, right = undisturbed(parent, tmp_path / "undisturbed", place.story, place.specimens)
    narrow = {"TERM": "dumb", "COLUMNS": "20", "LANG": "C", "LC_ALL": "C", "NO_COLOR": "1"}
    odd = Around(variables=narrow, patch="stand_ins:clock_that_jumps")
    words = [word for word in place.words if word != "--json"]
    ended = parent.run(words, place.folder, around=odd)
    assert ended.code == 0, ended.err
    assert (ended.out + ended.err).isascii()
    assert "\x1b" not in ended.out + ended.err
    assert place.contents() == right


class Hub(http.server.BaseHTTPRequestHandler):
    """Stand-in for the hub, on the loopback: the name of a model says how it is answered."""

    ANSWERS: Mapping[str, tuple[int, dict[str, str]]] = {
        "gated": (403, {"X-Error-Code": "GatedRepo"}),
        "secret": (401, {"X-Error-Code": "RepoNotFound"}),
        "token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
        "busy": (429, {"Retry-After": "0"}),
        "revision": (404, {"X-Error-Code": "RevisionNotFound"}),
        "gone": (404, {"X-Error-Code": "RepoNotFound"}),
    }

    def do_GET(self) -> None:
        name = next((name for name in self.ANSWERS if f"/owner/{name}" in self.path), "gone")
        status, headers = self.ANSWERS[name]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_r7_a_hub_that_refuses_is_one_line_and_the_token_is_never_told(tmp_path: Path) -> None:
    said = {
        "gated": "gated|restricted|access",
        "secret": "hf auth login",
        "token": "token|log in|auth",
        "revision": "revision|no such",
        "gone": "no such model|not found",
        "offline": "offline|no network",
        "away": "no network|reach|connect",
    }
    assert _wrong_with_hub(said, tmp_path) == []


@pytest.mark.slow
def test_r7_a_hub_that_is_asked_too_often_is_told_as_that(tmp_path: Path) -> None:
    assert _wrong_with_hub({"busy": "429|too many|later"}, tmp_path) == []


def _wrong_with_hub(said: Mapping[str, str], folder: Path) -> list[str]:
    """Ask a hub for models that it answers in these ways, all at once; return what is told wrongly."""
    wrong = []
    with hub() as address:
        own = {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0"}
        other = {"offline": {"HF_HUB_OFFLINE": "1"}, "away": {"HF_ENDPOINT": "http://127.0.0.1:9"}}
        runs = {name: _start(f"owner/{name}", own | other.get(name, {}), folder) for name in said}
        for name, run in runs.items():
            out, err = run.communicate(timeout=120)
            lines = err.strip().splitlines()
            right = run.returncode == 4 and "Traceback" not in err and TOKEN not in out + err
            right = right and [line.partition(":")[0] for line in lines[-2:]] == ["error", "hint"]
            told = " ".join(lines[-2:]).lower()
            if not right or not any(part in told for part in said[name].split("|")):
                wrong.append(f"{name}: exit {run.returncode}: {err[-600:]}")
    return wrong


def _start(model: str, variables: Mapping[str, str], folder: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "structprune", "inspect", model, "--revision", "main"]
    pipe = subprocess.PIPE
    around = os.environ | VARIABLES | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=around, cwd=folder)


def test_no_event_touched_an_input(specimens: Path, place: Place, parent: Parent) -> None:
    before = stamps(specimens)
    assert parent.run(place.words, place.folder).code == 0
    assert stamps(specimens) == before
