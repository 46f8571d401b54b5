"""Measures a model, and the dense one in the same run; writes no model."""

import logging
from typing import Any

from structprune.calibration.text_source import DEMO, DEMO_VISION
from structprune.checkpoint.locate import resolve
from structprune.checkpoint.manifest import read_manifest
from structprune.checkpoint.source import Source, open_measured
from structprune.errors import UsageError
from structprune.evaluation.evaluation import gate
from structprune.evaluation.exam import Exam
from structprune.models.cost import weight_bytes
from structprune.models.opening import Opening
from structprune.pipeline.decision import shaping_versions
from structprune.pipeline.examine import prepare_exam
from structprune.pipeline.finish import measure
from structprune.progress import Progress, silent, step
from structprune.ranks import joined_ranks
from structprune.recipe.options import EvaluateOptions
from structprune.report.finished import run_of

logger = logging.getLogger(__name__)


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
        model: "demo", "demo-vision", a folder, a hub name, or a kept adapter's folder.
        options: What to measure; where it names nothing, held-out text of the demo's world, or held-out
            questions of the vision demo's for its model.
        opening: How both are opened.
        revision: Branch, tag or commit of a hub model.
        progress: Told (stage, done, total).

    Raises:
        UsageError: `options.max_ppl_ratio` is given without `compare`, or as for `prepare_exam`.
        QualityError: `options.max_ppl_ratio` was missed.
        InputError: A process of the launch has another model, other texts or another version.

    Returns:
        The figures; "run": which run wrote the model, for `report_runs`, or None; "dense": "parameters" and
        "bytes" of the dense model, or None. Of several processes that a launcher started the first one's,
        and {} for the others.
    """
    # What is returned holds no continuations, which take a forward of each model for every token.
    options = _with_text(options or EvaluateOptions(), model).model_copy(update={"generations": False})
    with joined_ranks() as ranks:
        with step(progress, "read"):
            folder = resolve(model, revision=revision)
            source = open_measured(model, folder, opening)
            compared = options.compare
            dense = open_measured(compared, resolve(compared), opening) if compared else None
            exam = prepare_exam(options, source, None, dense)
        ranks.check_alike("this evaluation", _fingerprint(source, dense, exam))
        result = measure(source, dense, exam, ranks=ranks, progress=progress)
        if options.max_ppl_ratio is not None:
            gate(result, options.max_ppl_ratio)
    if not ranks.first:
        return {}
    size = dense and {"parameters": dense.parameters, "bytes": weight_bytes(dense.folder)}
    return result.as_json() | {"run": run_of(read_manifest(folder)), "dense": size}


def _fingerprint(source: Source, dense: Source | None, exam: Exam) -> dict[str, Any]:
    """Return what shapes the figures."""
    return {
        "weights": source.scan.weights,
        "compare": dense.scan.weights if dense else None,
        "evaluate": exam.facts,
        "dtype": source.opening.dtype,
        "versions": shaping_versions(),
    }


def _with_text(options: EvaluateOptions, model: str) -> EvaluateOptions:
    """Return what is measured; whoever asks for nothing gets the text that is always there."""
    if options.skip:
        raise UsageError("evaluate.skip leaves nothing to do", hint="leave it out, or name a text or a task")
    if options.max_ppl_ratio is not None and options.compare is None:
        raise UsageError("max_ppl_ratio needs a dense model to compare with", hint="name it: --compare DENSE")
    if options.asks:
        return options
    if model == DEMO_VISION:
        return options.model_copy(update={"questions": DEMO_VISION})
    if model != DEMO:
        logger.warning("measuring on the built-in demo text; give --text like what the model will read")
    return options.model_copy(update={"text": (DEMO,)})
