"""The training script runs from end to end; twenty steps teach little, but the loss falls."""

import os
import re
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]


def test_twenty_steps_train_save_and_report(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts/train_demo.py"),
        "--steps",
        "20",
        "--output",
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=environment)
    found = re.search(r"held-out loss ([\d.]+), entropy ([\d.]+)", done.stdout)
    assert found
    assert float(found[2]) < float(found[1]) < 6.93  # log 1024: what knowing nothing costs
    assert AutoTokenizer.from_pretrained(tmp_path).vocab_size <= 1024
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.head_dim == 24
