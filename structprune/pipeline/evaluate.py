"""Measures a model, and the dense one in the same run; writes no model."""

from typing import Any

from structprune.checkpoint.locate import resolve
from structprune.checkpoint.source import Source, open_source
from structprune.evaluation.evaluation import gate
from structprune.pipeline.finish import measure
from structprune.progress import Progress, silent
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
