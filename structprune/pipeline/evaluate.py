"""Measures a model, and the dense one in the same run; writes no model."""

from typing import Any

from structprune.checkpoint.locate import resolve
from structprune.checkpoint.source import open_measured
from structprune.evaluation.evaluation import gate
from structprune.models.opening import Opening
from structprune.pipeline.finish import measure
from structprune.progress import Progress, silent
from structprune.recipe.options import EvaluateOptions


def evaluate(
    model: str,
    options: EvaluateOptions | None = None,
    *,
    opening: Opening = Opening(),
    revision: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a model, and with `options.compare` the dense one in the same run.

    Args:
        model: "demo", a folder, a hub name, or a kept adapter's folder.
        options: What to measure; held-out text of the demo's world unless given.
        opening: How both are opened.
        revision: Branch, tag or commit of a hub model.
        progress: Told (stage, done, total).

    Raises:
        QualityError: `options.max_ppl_ratio` was missed.
    """
    options = options or EvaluateOptions()
    progress("evaluate", 0, 1)
    source = open_measured(model, resolve(model, revision=revision), opening)
    dense = open_measured(options.compare, resolve(options.compare), opening) if options.compare else None
    result = measure(source, dense, options)
    progress("evaluate", 1, 1)
    if options.max_ppl_ratio is not None:
        gate(result, options.max_ppl_ratio)
    return result.as_json()
