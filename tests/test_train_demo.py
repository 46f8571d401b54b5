"""The training script runs from end to end; twenty steps teach little, but the loss falls."""

import os
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_demo.py"
Script = Callable[..., str]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Run the script in this process, which has its imports behind it, and return its stdout."""

    def run(*words: object) -> str:
        monkeypatch.syspath_prepend(str(SCRIPT.parent))
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return run


def script_in_a_shell(*words: object) -> str:
    """Run the script as a user does and return its stdout."""
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=environment)
    return done.stdout


def train(run: Script, output: Path, steps: int, *more: str) -> tuple[float, float]:
    """Run the script and return the held-out loss and the entropy that it reports."""
    found = re.search(
        r"held-out loss ([\d.]+), entropy ([\d.]+)", run("--steps", steps, "--output", output, *more)
    )
    assert found
    return float(found[1]), float(found[2])


def test_the_vision_demo_trains_saves_and_reports(tmp_path: Path, script: Script) -> None:
    said = script("--vision", "--steps", 4, "--output", tmp_path)
    # Kind, share of right answers, and in brackets that of the commonest answer.
    found = re.findall(r"(\w+) (\d\.\d+) \((\d\.\d+)\)", said)
    assert [kind for kind, _, _ in found] == ["colour", "shape", "place", "count", "presence"]
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert (config.model_type, config.image_seq_length) == ("llava", 144)
    assert len((tmp_path / "calibration.jsonl").read_text().splitlines()) == 200


@pytest.mark.slow
def test_twenty_steps_train_save_and_report(tmp_path: Path) -> None:
    untrained, _ = train(script_in_a_shell, tmp_path / "one", 1)
    loss, entropy = train(script_in_a_shell, tmp_path / "twenty", 20)
    assert entropy < loss < untrained - 0.25
    assert AutoTokenizer.from_pretrained(tmp_path / "twenty").vocab_size <= 1024
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "twenty").config.head_dim == 24


def test_a_mixture_of_experts_is_trained_the_same_way(tmp_path: Path, script: Script) -> None:
    loss, entropy = train(script, tmp_path / "mixture", 2, "--experts")
    assert entropy < loss < 7.5  # one token of about a thousand is worth 6.9 nats
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture").config
    assert (config.num_local_experts, config.num_experts_per_tok) == (8, 2)
    assert not config.output_router_logits
