"""What is said before torch and transformers are loaded: they take seconds, and a typo should not wait."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from structprune.cli.spellings import OURS

HEAVY = ("torch", "transformers")
# Runs each line in one fresh interpreter; tells its exit code, what it printed and which of HEAVY is loaded.
RUN = """
import contextlib, io, json, sys
from structprune.cli import main

told = []
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(line)
    heavy = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
    told.append([code, out.getvalue() + err.getvalue(), heavy])
print(json.dumps(told))
"""
RECIPES = {
    "bad.yaml": "model: demo\noutput: [\n",
    "twice.yaml": "model: demo\nmodel: demo\n",
    "modle.yaml": "modle: demo\noutput: out\nprune: wanda\n",
    "sampels.yaml": "model: demo\noutput: out\nprune: wanda\ncalibration: {sampels: 4}\n",
    "wandda.yaml": "model: demo\noutput: out\nprune: [{method: wanda}, {method: wandda}]\n",
}
LINES = {
    "--help": (0, "prune"),
    "-h": (0, "prune"),
    "prune -h": (0, "--sparsity"),
    "--version": (0, "structprune"),
    "methods": (0, "wanda"),
    "prun": (2, "did you mean 'prune'"),
    "prune --nosuch": (2, "--nosuch"),
    "prune m o --method wandda": (2, "did you mean 'wanda'"),
    "prune m o --prune_method wandda": (2, "did you mean 'wanda'"),
    "methods wandda": (2, "did you mean 'wanda'"),
    "prune m o": (2, "prune.method is missing"),
    "prune m --method wanda": (2, "OUT is missing"),
    "prune m o --method wanda --sparsity 50": (2, "did you mean 0.5"),
    "prune bad.yaml": (2, "bad.yaml"),
    "prune twice.yaml": (2, "twice"),
    "prune nosuch.yaml": (2, "no such file"),
    "prune modle.yaml": (2, "did you mean 'model'"),
    "prune -C sampels.yaml": (2, "did you mean 'samples'"),
    "prune wandda.yaml": (2, "did you mean 'wanda'"),
    "evaluate m --set windos=3": (2, "did you mean 'windows'"),
    "evaluate m --windows 0": (2, "evaluate.windows"),
    "evaluate m -C sampels.yaml": (2, "did you mean 'samples'"),
    "recover m o": (2, "--data is missing"),
    "recover m o --data demo --set calibration.samples=3": (2, "does not read it"),
}


def test_what_needs_no_model_is_said_without_torch(tmp_path: Path) -> None:
    for name, text in RECIPES.items():
        (tmp_path / name).write_text(text)
    words = json.dumps([line.split() for line in LINES])
    done = subprocess.run(
        [sys.executable, "-c", RUN, words, json.dumps(HEAVY)], cwd=tmp_path, capture_output=True, text=True
    )

    assert not done.returncode, done.stderr
    for (line, (code, said)), told in zip(LINES.items(), json.loads(done.stdout), strict=True):
        assert told[0] == code, f"{line}: {told[1]}"
        assert said in told[1], line
        assert not told[2], line


@pytest.mark.parametrize("flag", OURS)
def test_the_flag_of_another_tool_is_refused_with_ours(command, flag):
    for written in (flag, f"--{flag[2:].replace('-', '_')}" if flag.startswith("--") else flag):
        for name in ("prune", "evaluate", "recover"):
            done = command(name, "m", "o", written, "1")

            assert done.code == 2
            assert OURS[flag] in done.err or "No such option" not in done.err
