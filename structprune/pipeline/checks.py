"""Runs that write no model: evaluate and verify."""

from pathlib import Path
from typing import Any

from structprune.checkpoint import verify as verification
from structprune.checkpoint.export import Progress
from structprune.checkpoint.opened import Source, open_source
from structprune.checkpoint.source import resolve
from structprune.checkpoint.verify import silent
from structprune.evaluate import gate
from structprune.pipeline.finish import measure
from structprune.recipe.options import EvaluateOptions


def evaluate(
    model: str,
    options: EvaluateOptions | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    stream: bool | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a model, and with `options.compare` the dense one in the same run.

    Args:
        model: "demo", a folder, a hub name.
        options: What to measure; held-out text of the demo's world unless given.
        device: "auto" for the accelerator there is.
        dtype: What to compute in; "auto" is the dtype of the files.
        stream: Hold one block in memory; chosen by the free memory unless given.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Run code that the model folder brings along.
        progress: Told (stage, done, total).

    Raises:
        QualityError: `options.max_ppl_ratio` was missed.
    """
    options = options or EvaluateOptions()

    def opened(name: str) -> Source:
        folder = resolve(name, revision=revision if name == model else None)
        return open_source(
            name, folder, dtype=dtype, device=device, stream=stream, trust_remote_code=trust_remote_code
        )

    progress("evaluate", 0, 1)
    result = measure(opened(model), opened(options.compare) if options.compare else None, options)
    progress("evaluate", 1, 1)
    if options.max_ppl_ratio is not None:
        gate(result, options.max_ppl_ratio)
    return result.as_json()


def verify(
    folder: str | Path, against: str | None = None, *, stream: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Measure a folder from its files and reload it in a fresh process.

    Args:
        folder: What structprune wrote, or any model folder.
        against: The model it was made from.
        stream: Hold one block in memory.
        progress: Told (stage, done, total).
    """
    path = resolve(str(folder))
    source = resolve(against) if against else None
    return verification.verify(path, source, stream=stream, progress=progress).as_json()
