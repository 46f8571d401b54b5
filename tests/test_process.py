"""The command line as a process of its own: what the shell, the signals and the limits around it do to it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Command

COMMAND = f"{sys.executable} -m structprune"
# A quick one with text, one with JSON, one that ends before any command, and one that fails.
LINES = {
    "--version": 0,
    "--help": 0,
    "methods --json": 0,
    "prun --json": 2,
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def shell(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line in a real shell; redirections are the shell's."""
    found = {**os.environ, **variables}
    return subprocess.run(line, shell=True, capture_output=True, text=True, env=found, timeout=120)


@pytest.mark.parametrize(("words", "code"), LINES.items())
@pytest.mark.parametrize("where", [">&-", ">&- 2>&-", "<&- >&- 2>&-", "2>&-", "2>/dev/full"])
def test_a_closed_stdout_or_a_stderr_of_any_kind_changes_no_exit_code(
    words: str, code: int, where: str
) -> None:
    ended = shell(f"{COMMAND} {words} {where}")

    assert ended.returncode == code
    assert len(ended.stderr.splitlines()) == (2 if code and "2>" not in where else 0)


@pytest.mark.parametrize(("words", "code"), LINES.items())
def test_a_full_stdout_is_one_error_and_four(words: str, code: int) -> None:
    ended = shell(f"{COMMAND} {words} >/dev/full")

    assert ended.returncode == (code or 4)
    assert [line.partition(":")[0] for line in ended.stderr.splitlines()] == ["error", "hint"]
    assert code or "stdout: No space left on device" in ended.stderr
    assert shell(f"{COMMAND} {words} >/dev/full 2>/dev/full").returncode == (code or 4)


def test_a_run_whose_stdout_is_full_has_done_its_work(llama: Path, tmp_path: Path, command: Command) -> None:
    run = f"{COMMAND} prune {llama} {tmp_path / 'out'} --method magnitude --sparsity 0.5"
    ended = shell(f"{run} >/dev/full 2>{tmp_path / 'told'}")

    told = (tmp_path / "told").read_text()
    assert ended.returncode == 4, told
    assert "stdout: No space left on device" in told
    assert "Traceback" not in told
    assert command("verify", tmp_path / "out").code == 0


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    ended = shell(f"{COMMAND} --help | true; echo ${{PIPESTATUS[0]}}", SHELL="/bin/bash")

    assert "Traceback" not in ended.stderr
    assert "error" not in ended.stderr


@pytest.mark.parametrize(
    ("module", "number"),
    [
        *(("structprune.cli", number) for number in SIGNALS),
        *((module, signal.SIGTERM) for module in ("torch", "transformers")),
        *(
            pytest.param(module, number, marks=pytest.mark.slow)
            for module in ("torch", "transformers")
            for number in (signal.SIGINT, signal.SIGHUP)
        ),
    ],
)
def test_a_signal_during_the_imports_is_one_line_and_its_code(module: str, number: int) -> None:
    """The signal comes in the middle of importing a module, from a finder that is asked for it."""
    line = (
        "import os, runpy, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        f"            os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv[1:] = ['inspect', 'demo']\n"
        "runpy.run_module('structprune', run_name='__main__')\n"
    )
    ended = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, timeout=120)

    assert ended.returncode == 128 + number, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.splitlines().count(f"error: stopped by signal {int(number)}") == 1
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("kibibytes", [30_000, 300_000, 600_000])
def test_a_limit_of_memory_that_even_the_imports_pass_is_named(kibibytes: int) -> None:
    ended = shell(f"ulimit -v {kibibytes}; {COMMAND} inspect demo")

    assert ended.returncode == 4, ended.stderr
    assert [line.partition(":")[0] for line in ended.stderr.splitlines()] == ["error", "hint"]
    assert "ulimit -v" in ended.stderr


@pytest.mark.parametrize("level", ["1", "2"])
def test_a_python_without_asserts_is_refused_by_name(level: str) -> None:
    ended = shell(f"{COMMAND} inspect demo --json", PYTHONOPTIMIZE=level)

    assert ended.returncode == 4
    assert f"PYTHONOPTIMIZE={level}" in ended.stderr


def test_the_library_refuses_a_python_without_asserts_as_well() -> None:
    ended = shell(f"{sys.executable} -OO -c 'import structprune; structprune.prune'")

    assert "EnvironmentFailure: Python runs with PYTHONOPTIMIZE=2" in ended.stderr
