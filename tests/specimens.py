"""One tiny specimen of everything that structprune reads and writes, made by the commands themselves."""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from structprune.checkpoint.locate import demo_folder
from structprune.cli import main
from structprune.evaluation import footprint
from structprune.proof import reloading
from tests.tiny import save_tiny

TEXT = "".join(f"{number} follows {number - 1}, and {number + 1} comes next. " for number in range(1, 400))
TRAINING = ["--steps", "4", "--length", "16", "--batch-size", "2", "--rank", "2", "--learning-rate", "1e-2"]
CHECKS = ["--set", "check_every=2"]
# What says when, where and by whom it was written, in the report, and in what is made of the report.
DATED = ("README.md", "structprune.json", "structprune/run.json", "sparsity.png")
REPORT = "structprune/report.json"


@dataclass(frozen=True)
class Finished:
    """A finished command: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Return the one JSON object on stdout."""
        result: dict[str, Any] = json.loads(self.out)
        assert self.out.count("\n") == 1
        return result


def run(*words: object) -> Finished:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Finished(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def no_fresh_process() -> Iterator[None]:
    """Stand-in: fresh processes, nine tenths of a tiny run, find what they should."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_fresh_process(patch)
        yield


def leave_out_fresh_process(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reloading, "check_reload", lambda *_, **__: None)
    # By its path: the package has a function of that name too.
    patch.setattr(import_module("structprune.proof.verify"), "check_running", lambda *_: None)
    patch.setattr(footprint, "in_fresh_process", lambda _, workload: [2**20 for _ in workload.batches])


def leave_out_waiting(patch: pytest.MonkeyPatch) -> None:
    # It refuses a closed descriptor as fsync does.
    patch.setattr(os, "fsync", os.fstat)


def quick(text: Path) -> list[str]:
    """Return the words of an evaluation of next to nothing."""
    keys = {"text": text, "windows": 1, "length": 16, "generations": "false"}
    return [word for key, value in keys.items() for word in ("--set", f"evaluate.{key}={value}")]


def calibrated(text: Path) -> list[str]:
    """Return the words of a calibration on next to nothing."""
    return ["--calibration", str(text), "--samples", "2", "--length", "16"]


def write_specimens(folder: Path) -> Path:
    """Write a model, a text, a recipe, and what the commands make of them; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny("llama", folder / "model", shards=3)
    text = folder / "text.txt"
    text.write_text(TEXT)
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": TEXT[:300], "id": n}) + "\n" for n in range(9))
    )
    shutil.copy(demo_folder("demo-vision").parent / "calibration/000.png", folder / "picture.png")
    recipe = {
        "model": str(folder / "model"),
        "output": str(folder / "unwritten"),
        "prune": {"method": "magnitude", "sparsity": 0.5},
        "calibration": {"source": str(text), "samples": 2, "length": 16},
        "evaluate": {"text": [str(text)], "windows": 1, "length": 16, "generations": False},
        "seed": 3,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe, indent=1))
    model, pruned = folder / "model", folder / "pruned"
    lines: Sequence[Sequence[object]] = (
        ["prune", model, pruned, "--method", "magnitude", "--sparsity", "2:4", *quick(text)],
        ["prune", model, folder / "solved", "--method", "sparsegpt", *calibrated(text), *quick(text)],
        ["export", pruned, folder / "packed", "--to", "2:4"],
        ["prune", "demo-vision", folder / "dropping", "--method", "divprune", "--no-evaluate"],
        ["recover", pruned, folder / "adapter", "--data", text, *TRAINING, *CHECKS, "--keep-adapter"],
    )
    with no_fresh_process():
        for line in lines:
            done = run(*line, "--json")
            assert done.code == 0, done.err
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """Return kind or sha256 of everything in and under a folder, links not followed, by relative path."""
    return {path.relative_to(folder).as_posix(): _said(path) for path in sorted(folder.rglob("*"))}


def stamps(folder: Path) -> dict[str, tuple[int, int, int, str]]:
    """Return inode, time and size beside the hash: also what is written anew with the same bytes shows."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.lstat()
        found[str(path)] = (status.st_ino, status.st_mtime_ns, status.st_size, _said(path))
    return found


def result_of(folder: Path) -> dict[str, str]:
    """Return the hashes of all below a folder that the same run gives again; of a report, the undated."""
    found = {name: digest for name, digest in hashes(folder).items() if not name.endswith(DATED)}
    for name in found:
        if name.endswith(REPORT):
            with contextlib.suppress(ValueError):  # a damaged one is known by its hash
                found[name] = json.dumps(_undated(json.loads((folder / name).read_bytes())), sort_keys=True)
    return found


def _undated(report: Any) -> Any:
    """Return a report without what differs from run to run: time, memory, place, and what was resumed."""
    dated = (
        "seconds",
        "phases",
        "peak_rss_bytes",
        "blocks_resumed",
        "output",
        "machine",
        "resumed",
        "steps_resumed",
    )
    if isinstance(report, dict):
        return {key: _undated(value) for key, value in report.items() if not key.startswith(dated)}
    return [_undated(value) for value in report] if isinstance(report, list) else report


def _said(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return f"kind {path.stat().st_mode:o}"
