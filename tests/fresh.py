"""Fresh processes in a tenth of the time: children of a parent that has done nothing but their imports.

Nine tenths of a fresh process on a tiny model are the imports of torch and transformers. A child here shares
with the run that starts it what any other process does: the disk and the environment. What the parent was
not started for is started for real: other programs, another interpreter, another environment. So is
everything in a test that asks for the fixture `really_fresh`.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from structprune.evaluation import footprint
from structprune.proof import fresh_process

PARENT = Path(__file__).with_name("fresh_parent.py")
# A parent that has structprune imported proves nothing about plain transformers.
PROGRAMS = (
    (str(fresh_process.PLAIN), "transformers.models.llama.modeling_llama"),
    (*fresh_process.OURS.values(), footprint.__name__),
)
# What pytest says of the test that runs.
PASSING = ("PYTEST_CURRENT_TEST",)


class FreshProcesses:
    """Stands in for `subprocess` where a fresh process is started, as long as the `with` block lasts."""

    def __init__(self) -> None:
        self._python = sys.executable
        self._parents: dict[object, subprocess.Popen[str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for parent in self._parents.values():
            parent.communicate(timeout=60)

    def run(self, words: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a Python program as `subprocess.run` would that captures its output as text."""
        program, *rest = [word for word in words[1:] if word not in ("-P", "-m")]
        environment = {name: value for name, value in options["env"].items() if name not in PASSING}
        parent = self._parent(program, environment) if words[:2] == [self._python, "-P"] else None
        if parent is None:
            return subprocess.run(words, **options)
        with tempfile.TemporaryDirectory(prefix="fresh-") as name:
            out, err = Path(name, "out"), Path(name, "err")
            job = {"program": program, "words": rest, "environment": options["env"], "place": str(Path.cwd())}
            assert parent.stdin is not None and parent.stdout is not None
            parent.stdin.write(json.dumps(job | {"out": str(out), "err": str(err)}) + "\n")
            parent.stdin.flush()
            code = int(parent.stdout.readline())
            said = [path.read_text(errors=options["errors"]) for path in (out, err)]
        return subprocess.CompletedProcess(words, code, *said)

    def _parent(self, program: str, environment: Mapping[str, str]) -> subprocess.Popen[str] | None:
        """Return the parent of a program's processes in an environment; None where there is none."""
        programs = next((some for some in PROGRAMS if program in some), None)
        if programs is None:
            return None
        key = programs, frozenset(environment.items())
        if key not in self._parents:
            words, pipe = [self._python, "-P", str(PARENT), *programs], subprocess.PIPE
            parent = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environment)
            assert parent.stdout is not None
            assert parent.stdout.readline() == "\n"
            self._parents[key] = parent
        return self._parents[key]


def place_fresh_processes(patch: pytest.MonkeyPatch, processes: Any) -> None:
    """Let structprune start its fresh processes with `processes`: a `FreshProcesses`, or `subprocess`."""
    for module in (fresh_process, footprint):
        patch.setattr(module, "subprocess", processes)
