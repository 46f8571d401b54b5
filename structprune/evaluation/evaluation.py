"""How good a model is: perplexity with its protocol stamped on it, divergence from dense, lm-eval tasks.

A perplexity means nothing without its text, window length, stride, beginning-of-sequence rule and dtype;
published figures differ most often in just these. They are therefore part of the result, and two models are
compared only in one run, on the same windows.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from structprune.calibration.data import sequence_start
from structprune.errors import QualityError, UsageError
from structprune.evaluation.exam import Exam, read_exam
from structprune.evaluation.generations import generations
from structprune.evaluation.harness import harness, metrics
from structprune.evaluation.harness import save as save_results
from structprune.evaluation.memory import Memory
from structprune.evaluation.perplexity import NOT_FINITE, Scores, score
from structprune.evaluation.protocol import dtype_of, same_footing, stamped_versions
from structprune.evaluation.questions import ask_questions
from structprune.models.streamed import Model, StreamedModel
from structprune.progress import Progress, silent
from structprune.ranks import Ranks
from structprune.recipe.options import EvaluateOptions

__all__ = ["Evaluation", "evaluate", "gate", "generations", "harness"]

log = logging.getLogger(__name__)

Numbers = dict[str, dict[str, float | None]]


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        perplexity: Text name -> "model", "dense" (None without a dense model); always finite.
        divergence: Text name -> "kl" (mean KL(dense || model) per token, in nats), "kl_se" (its standard
            error over windows), "top1_agreement" (fraction of tokens, 0-1); empty without a dense model.
        questions: Name of the questions on images -> what `questions.ask_questions` returns.
        tasks: Task -> metric -> "model", "dense".
        protocol: "texts" (per text, how it was measured, as `protocol.cut_windows` stamps it), "tasks",
            "questions" where some were asked,
            "versions", and "flags": sentences about figures that could not be computed.
        generations: "prompt", "model", "dense": texts; left out of the JSON, because they belong into a
            report.
        harness: "model", "dense": lm-eval's own results, untouched.
    """

    perplexity: Numbers = field(default_factory=dict)
    divergence: Numbers = field(default_factory=dict)
    questions: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, Numbers] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    generations: list[dict[str, str | None]] = field(default_factory=list)
    harness: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return what `structprune evaluate --json` prints; figures that are not finite are None."""
        return {
            "perplexity": self.perplexity,
            "divergence": self.divergence,
            "tasks": self.tasks,
            "protocol": self.protocol,
            **({"questions": self.questions} if self.questions else {}),
        }

    def save_harness(self, folder: Path) -> list[Path]:
        """Write lm-eval's results as lm_eval-model.json and lm_eval-dense.json; the folder is made."""
        paths = {which: folder / f"lm_eval-{which}.json" for which in self.harness}
        for which, path in paths.items():
            folder.mkdir(parents=True, exist_ok=True)
            save_results(self.harness[which], path)
        return list(paths.values())


def evaluate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    exam: Exam | EvaluateOptions,
    *,
    dense: Model | None = None,
    dense_tokenizer: PreTrainedTokenizerBase | None = None,
    memory: Memory | None = None,
    ranks: Ranks = Ranks(),
    progress: Progress = silent,
) -> Evaluation:
    """Measure a model and, in the same run, the dense model it was made from.

    Args:
        model: In memory or streamed; tasks need it in memory.
        tokenizer: The model's.
        exam: What to measure, or what to read an exam from.
        dense: The model to compare with, opened from what `options.compare` names or from anything else.
        dense_tokenizer: The dense model's, to check that both read the same tokens.
        memory: What the dense model said in an earlier evaluation on this exam, and where to keep it.
        ranks: Those who share windows and questions; what generates text, and lm-eval, run on the first
            alone, and are missing in what the others return.
        progress: Told (stage, done, total).

    Raises:
        UsageError: A size is impossible, a task is unknown, or both models do not share the protocol.
        InputError: A text is too short, or a text or task cannot be trusted.
        EnvironmentFailure: Data cannot be reached, or lm-eval is not installed.
        QualityError: A loss or a perplexity is not finite, or a model answers lm-eval with NaN.
    """
    if dense is not None:
        same_footing(model, tokenizer, dense, dense_tokenizer)
    if isinstance(exam, EvaluateOptions):
        exam = read_exam(exam, tokenizer, model.config, streamed=isinstance(model, StreamedModel))
    options, memory = exam.options, memory or Memory()
    flags = [exam.reason] if exam.reason else []
    result = Evaluation(protocol={"texts": {}, "tasks": {}, "versions": stamped_versions(), "flags": flags})
    for text in exam.texts:
        result.protocol["texts"][text.name] = text.stamp | {"dtype": dtype_of(model)}
        say = memory.outputs if dense is not None else None
        found = score(
            model,
            text.windows,
            dense=dense,
            say=say,
            batch_size=options.batch_size,
            name=text.name,
            ranks=ranks,
            progress=progress,
        )
        _add_text(result, text.name, found)
    if exam.questions is not None:
        _add_questions(result, exam, model, dense, memory, ranks, progress)
    if not ranks.first:
        return result
    if exam.prompts:
        result.generations = _side_by_side(exam.prompts, model, dense, tokenizer, memory, progress)
    if options.tasks:
        if not ranks.alone:
            said = "lm-eval runs on the first process alone"
            log.warning(said)
            result.protocol["flags"].append(said)
        for which, one in (("model", model), ("dense", dense)):
            if one is not None:
                told = progress if which == "model" else partial(_of_dense, progress)
                run = partial(_run_tasks, one, tokenizer, exam, told)
                result.harness[which] = run() if which == "model" else memory.once("tasks", run)
        _add_tasks(result, options.limit)
    return result


def nothing_measured(exam: Exam) -> Evaluation:
    """Return the result of an exam that asks for nothing; it says why."""
    return Evaluation(
        protocol={"texts": {}, "tasks": {}, "versions": stamped_versions(), "flags": [exam.reason]}
    )


def gate(evaluation: Evaluation, max_ppl_ratio: float) -> None:
    """Hold a model to a limit: its perplexity divided by the dense one's, on every text.

    Raises:
        QualityError: A ratio is over `max_ppl_ratio`.
        UsageError: There is nothing to compare with.
    """
    for name, figures in evaluation.perplexity.items():
        if name not in evaluation.divergence:
            break
        mine, dense = figures["model"], figures["dense"]
        assert mine is not None and dense is not None
        if not mine / dense <= max_ppl_ratio:
            raise QualityError(
                f"the perplexity on {name} is {mine:.4g}, {mine / dense:.3g} times the dense {dense:.4g}; "
                f"at most {max_ppl_ratio:g} times were allowed",
                hint="prune less, recover, or raise max_ppl_ratio",
            )
    if not evaluation.divergence:
        raise UsageError(
            "max_ppl_ratio needs a text and a dense model to compare with",
            hint="give a text with --text and the dense model with --compare",
        )


def _add_questions(
    result: Evaluation,
    exam: Exam,
    model: Model,
    dense: Model | None,
    memory: Memory,
    ranks: Ranks,
    progress: Progress,
) -> None:
    # Reading the exam has refused a streamed model.
    assert isinstance(model, PreTrainedModel) and not isinstance(dense, StreamedModel)
    questions, size = exam.questions, exam.options.batch_size
    assert questions is not None
    found = ask_questions(
        model, questions, dense=dense, batch_size=size, memory=memory, ranks=ranks, progress=progress
    )
    stamp = questions.stamp | {"sha256": found.pop("sha256"), "dtype": dtype_of(model)}
    result.questions[questions.name] = found
    result.protocol["questions"] = {questions.name: stamp}


def _side_by_side(
    prompts: Sequence[str],
    model: Model,
    dense: Model | None,
    tokenizer: PreTrainedTokenizerBase,
    memory: Memory,
    progress: Progress,
) -> list[dict[str, str | None]]:
    go_on = partial(
        generations,
        tokenizer=tokenizer,
        prompts=prompts,
        first=sequence_start(tokenizer).token,
        progress=progress,
    )
    mine: Sequence[str] = go_on(model)
    other: Sequence[str | None] = [None] * len(prompts)
    if dense is not None:
        told = partial(_of_dense, progress)
        other = memory.once("generations", partial(go_on, dense, progress=told))
    return [
        {"prompt": prompt, "model": one, "dense": two}
        for prompt, one, two in zip(prompts, mine, other, strict=True)
    ]


def _of_dense(progress: Progress, stage: str, done: int, total: int) -> None:
    """Tell how far a stage is with the dense model, which has been done with the other one."""
    progress(f"{stage}, dense model", done, total)


def _run_tasks(
    model: Model, tokenizer: PreTrainedTokenizerBase, exam: Exam, progress: Progress
) -> dict[str, Any]:
    options = exam.options
    return harness(
        model,
        tokenizer,
        options.tasks,
        include_path=options.include_path,
        batch_size=options.batch_size,
        limit=options.limit,
        processor=exam.processor,
        progress=progress,
    )


def _add_text(result: Evaluation, name: str, scores: Scores) -> None:
    """Turn window sums into figures; a divergence that is not finite becomes None and a flag."""

    def checked(value: float, what: str) -> float | None:
        if math.isfinite(value):
            return value
        result.protocol["flags"].append(f"{name}: {what} is not finite")
        return None

    def perplexity(sums: list[float], which: str) -> float:
        mean = scores.mean(sums)
        # math.exp raises past 709, where a perplexity has long ceased to be one.
        if mean > 700:
            raise QualityError(
                f"the perplexity of the {which} on {name} is not finite: a loss of {mean:.4g} nats per token",
                hint=NOT_FINITE,
            )
        return math.exp(mean)

    compared = bool(scores.dense)
    result.perplexity[name] = {
        "model": perplexity(scores.model, "model"),
        "dense": perplexity(scores.dense, "dense model") if compared else None,
    }
    if compared:
        result.divergence[name] = {
            "kl": checked(scores.mean(scores.kl), "KL(dense || model)"),
            "kl_se": checked(scores.error(scores.kl), "the standard error of KL over windows"),
            "top1_agreement": checked(scores.mean(scores.agree), "top-1 agreement"),
        }


def _add_tasks(result: Evaluation, limit: int | None) -> None:
    """Set lm-eval's figures side by side and stamp how they were measured."""
    figures = {which: metrics(results) for which, results in result.harness.items()}
    dense = figures.get("dense", {})
    raw = result.harness["model"]
    for task, found in figures["model"].items():
        result.tasks[task] = {
            metric: {"model": value, "dense": dense.get(task, {}).get(metric)}
            for metric, value in found.items()
        }
        result.protocol["tasks"][task] = {
            "version": raw["versions"].get(task),
            "fewshot": raw["n-shot"].get(task),
            "samples": raw["n-samples"].get(task, {}).get("effective"),
            "limit": limit,
        }
