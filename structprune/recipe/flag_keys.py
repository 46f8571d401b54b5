"""Which key of a recipe a flag of the command line sets, for whoever writes the flag's name as a key."""

_SETS = {
    "prune.method": "method prune_method",
    "prune.sparsity": "sparsity sparsity_ratio sparsity_type",
    "prune.native: uniform": "uniform",
    "prune.native: pad": "pad",
    "prune.target": "target",
    "prune.fold": "fold",
    "prune.keep_scores": "keep_scores",
    "prune.include": "include",
    "prune.exclude": "exclude",
    "calibration.source": "calibration",
    "calibration.samples": "samples nsamples",
    "calibration.length": "length seqlen",
    "calibration.column": "column",
    "evaluate.skip: true": "no_evaluate",
    "evaluate.max_ppl_ratio": "max_ppl_ratio",
    "evaluate.text": "text",
    "evaluate.questions": "questions",
    "evaluate.tasks": "tasks",
    "evaluate.include_path": "include_path",
    "evaluate.windows": "windows",
    "evaluate.stride": "stride",
    "evaluate.limit": "limit",
    "evaluate.compare": "compare",
    "recover.data": "data",
    "recover.steps": "steps",
    "recover.rank": "rank",
    "recover.learning_rate": "learning_rate",
    "recover.teacher": "teacher",
    "recover.keep_adapter": "keep_adapter",
    "recover.gradient_checkpointing": "gradient_checkpointing",
    "recover.shard": "shard",
}
# A test compares this with what the commands make of their flags.
FLAG_KEYS = {flag: key for key, flags in _SETS.items() for flag in flags.split()}


def key_of_flag(here: str) -> str:
    """Return what the flag sets whose name was written as a key; "" where there is none.

    Args:
        here: The unknown key's dotted path.
    """
    path = [part for part in here.replace("-", "_").split(".") if not part.isdecimal()]
    key = FLAG_KEYS.get(path[-1], "")
    if not key or key == ".".join(path):  # the key is right, and this method has none
        return ""
    return f"--{path[-1].replace('_', '-')} sets {key}"
