"""Flags that other tools have taught people's fingers, and what each is called here.

lm-eval, mergekit, Wanda and SparseGPT, mlx-lm, llm-compressor, LLM-Pruner. Those that mean the same are
accepted where they are declared (`--nsamples`); here are those that mean something else, or nothing.
"""

import difflib
from collections.abc import Iterable

_MODEL = "MODEL stands first, without a flag: structprune prune MODEL OUT"
_OUT = "OUT stands behind MODEL, or give it as -o OUT"
_JSON = "the figures are printed as JSON with --json; send stdout to a file"
_CHUNKS = "the files keep the shards of MODEL"

OURS = {
    # What to work on and where to write.
    "--model": _MODEL,
    "-M": _MODEL,
    "--model-path": _MODEL,
    "--base-model": _MODEL,
    "--hf-path": _MODEL,
    "--model-args": "MODEL stands first; --dtype, --revision and --trust-remote-code are flags",
    "-a": "MODEL stands first; --dtype, --revision and --trust-remote-code are flags",
    "--save": _OUT,
    "--save-model": _OUT,
    "--output-dir": _OUT,
    "--mlx-path": _OUT,
    "--save-path": _OUT,
    "--output-path": f"{_OUT}; {_JSON}",
    # How much, by which method.
    "--ratio": "--sparsity, the fraction that is removed",
    "--pruning-ratio": "--sparsity, the fraction that is removed",
    "--compression-ratio": "--sparsity, the fraction that is removed",
    "--prune-n": "--sparsity N:M, with N kept",
    "--prune-m": "--sparsity N:M, with N kept",
    "--pruner": "--method",
    "--use-variant": "--set budget=owl, or --sparsity for each run",
    # Data.
    "--dataset": "--calibration for `structprune prune`, --data for recover, --text for evaluate",
    "--calib-dataset": "--calibration",
    "--num-samples": "--samples",
    "--num-calibration-samples": "--samples",
    "--max-seq-length": "--length",
    "--seq-len": "--length",
    "--max-length": "--length",
    "--random-seed": "--seed",
    # Where and how it runs.
    "--low-cpu-memory": "--stream",
    "--lazy-unpickle": "pickles are never read; there is nothing to set",
    "--cuda": "--device cuda",
    "--out-shard-size": _CHUNKS,
    "--max-shard-size": _CHUNKS,
    "--copy-tokenizer": "the tokenizer's files are always copied",
    "--no-copy-tokenizer": "the tokenizer's files are always copied",
    "--write-model-card": "a model card is always written",
    "--upload-repo": "nothing is uploaded; `hf upload` does that",
    "--push-to-hub": "nothing is uploaded; `hf upload` does that",
    "-c": "-C FILE, or --config FILE",
    "--recipe": "a recipe stands first: structprune prune RECIPE.yaml; or -C RECIPE.yaml",
    "--show-config": "--dry-run prints the whole recipe",
    "--log-level": "-v for more, -q for less",
    # Evaluation.
    "-t": "--tasks",
    "-b": "--batch-size",
    "-L": "--limit",
    "-f": "how many examples a task shows is written in its file; --include-path takes yours",
    "--num-fewshot": "how many examples a task shows is written in its file; --include-path takes yours",
    "--eval-zero-shot": "`structprune evaluate OUT --tasks A,B`",
    "--log-samples": "lm-eval's own results stand in OUT/structprune/evaluation",
    "-s": "lm-eval's own results stand in OUT/structprune/evaluation",
    "--wandb-args": _JSON,
    "--hf-hub-log-args": _JSON,
    "--eval": "`structprune evaluate OUT --text FILE`",
    # Recovery.
    "--iters": "--steps",
    "--max-steps": "--steps",
    "--num-train-epochs": "--steps, each of --batch-size sequences; the text is read as often as they need",
    "--num-epochs": "--steps, each of --batch-size sequences; the text is read as often as they need",
    "--per-device-train-batch-size": "--batch-size, over all processes",
    "--gradient-accumulation-steps": "there is none; --gradient-checkpointing makes a step cost less memory",
    "--bf16": "--dtype bfloat16",
    "--fp16": "--dtype bfloat16: training in float16 is not offered",
    "--lora-alpha": "--set alpha=32",
    "--warmup-ratio": "--set warmup=0.05",
    "--eval-steps": "--set check_every=25",
    "--save-steps": "--set check_every=25",
    "--num-steps": "--steps",
    "--lora-rank": "--rank",
    "--lora-r": "--rank",
    "--lr": "--learning-rate",
    "--num-layers": "every linear of every block is trained; --set ranks={...} tells them apart",
    "--resume-adapter-file": "the same command goes on where it was interrupted",
    "--merge": "the change is merged unless --keep-adapter is given",
}


def ours_for(flag: str, command: str, known: Iterable[str]) -> str:
    """Return a hint for a flag that a command does not have: ours for another tool's, or the nearest.

    Args:
        flag: As it was written, with dashes.
        command: The command's name.
        known: The flags that it has.
    """
    near = difflib.get_close_matches(flag, known, n=1)
    if flag in OURS or not near:
        return OURS.get(flag, f"`structprune {command} --help` lists what it takes")
    return f"did you mean {near[0]}?"
