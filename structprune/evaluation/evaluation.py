"""How good a model is: perplexity with its protocol stamped on it, divergence from dense, lm-eval tasks.

A perplexity means nothing without its text, window length, stride, beginning-of-sequence rule and dtype;
published figures differ most often in just these. They are therefore part of the result, and two models are
compared only in one run, on the same windows.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from structprune.calibration.data import positions, sequence_start, window_length
from structprune.calibration.text_source import TextSource
from structprune.calibration.texts import DEMO, name_of, pieces
from structprune.demo.world import HELD_OUT_SEED
from structprune.demo.world import text as demo_text
from structprune.errors import QualityError, UsageError
from structprune.evaluation.generations import beginnings, generations
from structprune.evaluation.harness import harness, metrics
from structprune.evaluation.harness import save as save_results
from structprune.evaluation.perplexity import NOT_FINITE, Scores, score
from structprune.evaluation.protocol import cut_windows, dtype_of, same_footing, stamped_versions
from structprune.models.streamed import Model
from structprune.recipe.options import EvaluateOptions

__all__ = ["Evaluation", "evaluate", "gate", "generations", "harness"]

log = logging.getLogger(__name__)

DEMO_CHARACTERS = 200_000

Numbers = dict[str, dict[str, float | None]]


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        perplexity: Text name -> "model", "dense" (None without a dense model); always finite.
        divergence: Text name -> "kl" (mean KL(dense || model) per token, in nats), "kl_se" (its standard
            error over windows), "top1_agreement" (fraction of tokens, 0-1); empty without a dense model.
        tasks: Task -> metric -> "model", "dense".
        protocol: "texts" (per text, how it was measured, as `protocol.cut_windows` stamps it), "tasks",
            "versions", and "flags": sentences about figures that could not be computed.
        generations: "prompt", "model", "dense": texts; left out of the JSON, because they belong into a
            report.
        harness: "model", "dense": lm-eval's own results, untouched.
    """

    perplexity: Numbers = field(default_factory=dict)
    divergence: Numbers = field(default_factory=dict)
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
    options: EvaluateOptions,
    *,
    dense: Model | None = None,
    dense_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Evaluation:
    """Measure a model and, in the same run, the dense model it was made from.

    Args:
        model: In memory or streamed; tasks need it in memory.
        tokenizer: The model's.
        options: What to measure; the text "demo" is held-out text of the demo's generator.
        dense: The model to compare with, opened from what `options.compare` names or from anything else.
        dense_tokenizer: The dense model's, to check that both read the same tokens.

    Raises:
        UsageError: A size is impossible, a task is unknown, or both models do not share the protocol.
        InputError: A text is too short, or a text or task cannot be trusted.
        EnvironmentFailure: Data cannot be reached, or lm-eval is not installed.
        QualityError: A loss or a perplexity is not finite, or a model answers lm-eval with NaN.
    """
    names = [name_of(source) for source in options.text]
    if len(set(names)) < len(names):
        raise UsageError(f"two texts have the same name: {', '.join(names)}", hint="results are listed by it")
    if dense is not None:
        same_footing(model, tokenizer, dense, dense_tokenizer)
    longest = positions(model.config)
    size, first = window_length(options.length, longest), sequence_start(tokenizer)
    cut = partial(
        cut_windows,
        tokenizer=tokenizer,
        length=size,
        start=first,
        stride=options.stride,
        windows=options.windows,
    )
    result = Evaluation(protocol={"texts": {}, "tasks": {}, "versions": stamped_versions(), "flags": []})
    sources = options.text_sources
    # All texts are cut before the first forward, so that one that is too short stops the run at once.
    texts = [cut(_pieces(source), source=source.source) for source in sources]
    for name, source, (found, stamp) in zip(names, sources, texts, strict=True):
        log.info("perplexity on %s: %d windows of %d tokens", name, stamp["windows"], size)
        result.protocol["texts"][name] = stamp | asdict(source) | {"dtype": dtype_of(model)}
        scores = score(model, found, dense=dense, batch_size=options.batch_size, name=name)
        _add_text(result, name, scores)
    if sources and options.generations:
        chosen = beginnings(_pieces(sources[0]), tokenizer, max_length=longest)
        result.generations = _side_by_side(chosen, model, dense, tokenizer, first.token)
    if options.tasks:
        for which, one in (("model", model), ("dense", dense)):
            if one is not None:
                log.info("lm-eval on the %s: %s", which, ", ".join(options.tasks))
                result.harness[which] = harness(
                    one,
                    tokenizer,
                    options.tasks,
                    include_path=options.include_path,
                    batch_size=options.batch_size,
                    limit=options.limit,
                )
        _add_tasks(result, options.limit)
    return result


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


def _pieces(text: TextSource) -> Iterator[str]:
    if text.source == DEMO:
        # The built-in file is what calibration reads; what is measured must be text that it has not seen.
        return iter([demo_text(HELD_OUT_SEED, DEMO_CHARACTERS)])
    return pieces(text)


def _side_by_side(
    prompts: Sequence[str],
    model: Model,
    dense: Model | None,
    tokenizer: PreTrainedTokenizerBase,
    first: int | None,
) -> list[dict[str, str | None]]:
    mine: Sequence[str] = generations(model, tokenizer, prompts, first=first)
    other: Sequence[str | None] = [None] * len(prompts)
    if dense is not None:
        other = generations(dense, tokenizer, prompts, first=first)
    return [
        {"prompt": prompt, "model": one, "dense": two}
        for prompt, one, two in zip(prompts, mine, other, strict=True)
    ]


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
