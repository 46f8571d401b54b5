"""The built-in demo: a small closed world, a model that has learned it, and tasks to measure what it kept.

`world` writes text without end, `tasks` turns it into lm-eval tasks, `scripts/train_demo.py` trains the
model.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"  # a transformers checkpoint: LlamaForCausalLM in bfloat16, and its tokenizer
CALIBRATION = FOLDER / "calibration.txt"  # world.text(CALIBRATION_SEED, CALIBRATION_CHARACTERS)
