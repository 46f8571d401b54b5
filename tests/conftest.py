"""What every test stands on: nothing is downloaded, one thread, a tiny model, the command line."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

# Before anything imports the hub's client, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What is said is as wide as it is, also in a worker, which is told a terminal's width.
os.environ.pop("COLUMNS", None)

import pytest
import torch

from structprune.cli import main
from structprune.pipeline import finish
from tests.forks import Parent
from tests.fresh import FreshProcesses, place_fresh_processes
from tests.seeing import save_seeing
from tests.specimens import Finished, leave_out_waiting, write_specimens
from tests.tiny import save_tiny

DRAW = finish.draw
Command = Callable[..., Finished]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    # More threads than cores, in several workers, are many times slower; and sums depend on their number.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk() -> Iterator[None]:
    """Let no file wait until the disk has it, two thirds of a tiny run; only a power cut would tell."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_waiting(patch)
        yield


@pytest.fixture(autouse=True, scope="session")
def fresh_processes() -> Iterator[None]:
    """Fork fresh processes from parents that have their imports behind them."""
    with FreshProcesses() as processes, pytest.MonkeyPatch.context() as patch:
        place_fresh_processes(patch, processes)
        yield


@pytest.fixture
def really_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start fresh processes as a user's run does, imports included."""
    place_fresh_processes(monkeypatch, subprocess)


@pytest.fixture(autouse=True, scope="session")
def no_plots() -> Iterator[None]:
    """Draw no plots, a third of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "draw", lambda *_: None)
        yield


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw them as a user's run does."""
    monkeypatch.setattr(finish, "draw", DRAW)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process: `command("methods", "--json")`."""

    def run(*words: object) -> Finished:
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Finished(code, out, err)

    return run


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Llama, for tests that only read it."""
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny LLaVA of four blocks with its processor, for tests that only read it."""
    return save_seeing(tmp_path_factory.mktemp("seeing") / "model", depth=4)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Return a folder with an lm-eval task, `tiny_choice`."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "mc.jsonl"
    rows = [{"question": f"What follows {n}?", "choices": ["a", "b"], "answer": n % 2} for n in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny_choice.yaml").write_text(
        f"""
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} "
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
    )
    return folder


@pytest.fixture(scope="session")
def specimens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one of everything; who changes a file in it puts it back."""
    return write_specimens(tmp_path_factory.mktemp("specimens"))


@pytest.fixture(scope="session")
def parent() -> Iterator[Parent]:
    """Return a process that has everything imported, in whose children commands run."""
    with Parent() as warm:
        yield warm
