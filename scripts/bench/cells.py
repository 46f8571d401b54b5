"""What benches of quality share: windows that are scored, and cells that are compared window by window."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from transformers import PreTrainedTokenizerBase

from structprune.calibration import data
from structprune.evaluation.perplexity import Windows, windows_of

Cell = dict[str, Any]


def held_out_of(
    pieces: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    *,
    first: bool = False,
) -> Windows:
    """Return `count` windows of `length` tokens: the first of a text, or spread evenly over it."""
    every = windows_of(data.encode(pieces, tokenizer), length, first=data.sequence_start(tokenizer).token)
    step = len(every.inputs) // count
    if not step:
        raise SystemExit(f"the text has only {len(every.inputs)} windows of {length} tokens")
    step = 1 if first else step
    picked = slice(0, count * step, step)
    return Windows(every.inputs[picked], every.starts[picked])


def kept_cells(path: Path, protocol: str) -> dict[str, Any]:
    """Return what an earlier call measured, with its "cells"; none where there is no file."""
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cells": []}
    if kept.setdefault("protocol", protocol) != protocol:
        raise SystemExit(f"{path}: measured with another protocol, {kept['protocol']}")
    return kept


def difference(worse: Sequence[float], better: Sequence[float], tokens: Sequence[int]) -> tuple[float, float]:
    """Return the mean difference per token of paired windows, and its standard error."""
    per_window = [(a - b) / n for a, b, n in zip(worse, better, tokens, strict=True)]
    return fmean(per_window), stdev(per_window) / math.sqrt(len(per_window))


def pooled(cells: Sequence[Cell]) -> list[float]:
    """Return each window's divergence, averaged over seeds."""
    return [fmean(window) for window in zip(*(cell["windows"] for cell in cells), strict=True)]


def divergence_of(cells: Sequence[Cell]) -> tuple[float, float]:
    """Return the mean KL over seeds and its standard error over windows."""
    tokens = cells[0]["tokens"]
    return difference(pooled(cells), [0.0] * len(tokens), tokens)


def with_error(mean: float, error: float) -> str:
    """Return "mean ± standard error", the error with two digits."""
    digits = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 4
    return f"{mean:.{digits}f} ± {error:.{digits}f}"
