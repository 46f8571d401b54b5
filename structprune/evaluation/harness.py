"""lm-eval through its Python API: a model in memory, tasks by name, its own results kept as they are."""

import contextlib
import copy
import difflib
import json
import logging
import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from structprune.calibration.data import positions
from structprune.calibration.texts import data_failure
from structprune.errors import EnvironmentFailure, InputError, QualityError, UsageError
from structprune.evaluation.perplexity import NOT_FINITE
from structprune.models.streamed import Model, StreamedModel
from structprune.progress import Progress, silent, step

# Only standard errors without a closed form (medians, F1) are drawn; lm-eval's own 100 000 would take
# minutes.
BOOTSTRAPS = 1000
GENERATES = "generate_until"
# How the bars of requests begin what they say; those of documents that are read say otherwise.
RUNNING = "Running "


def harness(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    processor: Callable[[], ProcessorMixin] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run lm-eval tasks; those with images by lm-eval's multimodal model, all others by its model of text.

    Args:
        model: In memory.
        tokenizer: The model's; left as it is.
        tasks: Names of tasks, groups or tags, or patterns such as "mmlu_*".
        include_path: A folder with task files of your own; those of lm-eval are looked at only when it lacks
            a name.
        batch_size: Requests per forward.
        limit: Only so many documents of each task.
        processor: Opens the model's, which is done only where a task has images; it is left as it is.
        progress: Told (stage, done, total) of the requests of each kind.

    Returns:
        lm-eval's results as it returns them, without the samples.

    Raises:
        UsageError: A task is unknown, the model is streamed, or a task with images cannot be run.
        InputError: A task's file or data are damaged or missing.
        EnvironmentFailure: lm-eval is not installed, or a task's data cannot be reached.
        QualityError: The model's logits hold NaN.
    """
    _check_runs(streamed=isinstance(model, StreamedModel))
    import lm_eval

    # lm-eval prints while it draws standard errors, and sets a padding token on the tokenizer it is given.
    with contextlib.redirect_stdout(sys.stderr), _told_bars(progress), _without_git():
        with step(progress, "lm-eval, read tasks"):
            manager, names = _find(tasks, include_path)
            loaded = _load(manager, names)
        reads_images = _check_images(loaded["tasks"].values())
        if reads_images and processor is None:
            raise UsageError(
                f"lm-eval tasks {', '.join(names)}: they have images, and no processor is there to read them",
                hint="give the folder of a vision-language model with its processor",
            )
        with _quiet():
            if reads_images and processor is not None:
                runner = _seeing(model, processor(), batch_size)
            else:
                runner = _reading(model, tokenizer, batch_size, ", ".join(tasks))
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model=runner,
            tasks=_outermost(loaded),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
    return results


def _reading(model: Model, tokenizer: PreTrainedTokenizerBase, batch_size: int, names: str) -> Any:
    """Return lm-eval's model of text."""
    from lm_eval.models.huggingface import HFLM

    class Finite(HFLM):  # type: ignore[misc]  # lm-eval has no annotations
        """lm-eval's own model; it would count the guess that NaN sorts first as an answer."""

        def _model_call(self, *inputs: Any, **options: Any) -> Any:
            logits = super()._model_call(*inputs, **options)
            if bool(logits.isnan().any()):
                raise QualityError(f"lm-eval tasks {names}: the logits hold NaN", hint=NOT_FINITE)
            return logits

    return Finite(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)


def _seeing(model: Model, processor: ProcessorMixin, batch_size: int) -> Any:
    """Return lm-eval's model of images and text."""
    from lm_eval.models.hf_vlms import HFMultimodalLM

    class Seeing(HFMultimodalLM):  # type: ignore[misc]  # lm-eval has no annotations
        """lm-eval's own model; it would forget a processor that it is given, and look for one by name."""

        def _create_tokenizer(self, *_: Any, **__: Any) -> None:
            self.processor = copy.deepcopy(processor)
            self.tokenizer = self.processor.tokenizer

    # Beyond these a prompt is cut on the left, where an image may be.
    return Seeing(
        pretrained=model, batch_size=batch_size, max_length=positions(model.config), convert_img_format=True
    )


def _check_images(tasks: Collection[Any]) -> bool:
    """Tell whether tasks have images.

    Raises:
        UsageError: Some have and others have not; or answers of one are compared by likelihood.
    """
    seeing = [task for task in tasks if getattr(task, "MULTIMODAL", False)]
    if seeing and len(seeing) < len(tasks):
        raise UsageError(
            f"lm-eval task {seeing[0].task_name} has images, and others have none",
            hint="run the tasks with images in a command of their own",
        )
    for task in seeing:
        if task.OUTPUT_TYPE != GENERATES:
            # lm-eval pads such requests on the right and masks nothing: what drops tokens would choose by
            # padding and by the answer that it is shown.
            raise UsageError(
                f"lm-eval task {task.task_name}: images with output_type {task.OUTPUT_TYPE}",
                hint=f"use a task with images whose output_type is {GENERATES}",
            )
    return bool(seeing)


def check_tasks(tasks: Sequence[str], include_path: Path | None, *, streamed: bool) -> None:
    """Check that lm-eval is there and knows all tasks; their data are not looked at.

    Raises:
        UsageError: A task is unknown, or the model is streamed.
        EnvironmentFailure: lm-eval is not installed.
    """
    _check_runs(streamed=streamed)
    with contextlib.redirect_stdout(sys.stderr):
        _find(tasks, include_path)


def metrics(results: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return task -> metric -> value of lm-eval results.

    A metric of a named filter is "metric,filter"; the default filter's name is left out. Standard errors
    stand beside their metric as "metric_stderr". What lm-eval could not compute is None.
    """
    return {task: _numbers(row) for task, row in results["results"].items()}


def save(results: dict[str, Any], path: Path) -> None:
    """Write lm-eval results as lm-eval's own command writes them."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")


def _check_runs(*, streamed: bool) -> None:
    if streamed:
        raise UsageError(
            "lm-eval tasks need the whole model in memory, and it is streamed",
            hint="open it resident, or leave the tasks out",
        )
    try:
        import lm_eval.models.huggingface  # noqa: F401 - says whether it and what it needs are there
    except ModuleNotFoundError as error:
        hint = "pip install 'structprune[eval]'"
        raise EnvironmentFailure(f"lm-eval tasks need {error.name}", hint=hint) from None


def _numbers(row: dict[str, Any]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for key, value in row.items():
        if "," not in key or isinstance(value, str):
            continue
        metric, _, chosen = key.partition(",")
        number = float(value)
        name = metric if chosen == "none" else key
        found[name] = number if math.isfinite(number) else None
    return found


@contextlib.contextmanager
def _told_bars(progress: Progress) -> Iterator[None]:
    """Tell how far lm-eval is with its requests, and let nobody draw bars, for the length of a `with`.

    On a terminal theirs and the run's would be drawn over each other, and in a file every step of theirs is a
    line. lm-eval takes a flag for some of its bars and none for others, nor do the libraries that read its
    data.
    """
    from tqdm import tqdm

    begin, advance = tqdm.__init__, tqdm.update
    counts: dict[int, tuple[str, int, int]] = {}

    def hidden(bar: Any, *args: Any, **kwargs: Any) -> None:
        begin(bar, *args, **{**kwargs, "disable": True})
        counts.pop(id(bar), None)
        said = kwargs.get("desc") or ""
        if said.startswith(RUNNING) and kwargs.get("total"):
            counts[id(bar)] = f"lm-eval, {said.removeprefix(RUNNING)}", 0, int(kwargs["total"])

    def told(bar: Any, n: float | None = 1) -> Any:
        if id(bar) in counts:
            stage, done, total = counts[id(bar)]
            counts[id(bar)] = stage, done + int(n or 0), total
            progress(*counts[id(bar)])
        return advance(bar, n)

    with _replaced(tqdm, "__init__", hidden), _replaced(tqdm, "update", told):
        yield


@contextlib.contextmanager
def _without_git() -> Iterator[None]:
    """Let lm-eval find the commit of the working folder itself: outside a repository git complains."""
    import lm_eval.evaluator
    from lm_eval.loggers.utils import get_commit_from_path

    with _replaced(lm_eval.evaluator, "get_git_commit_hash", lambda: get_commit_from_path(Path.cwd())):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    former = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, former)


def _find(tasks: Sequence[str], include_path: Path | None) -> tuple[Any, list[str]]:
    """Return a task manager that knows all `tasks`, and the names that they match."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise UsageError(
            f"include_path {include_path}: no such folder",
            hint="check --include-path: the folder that holds your task files",
        )
    folder = None if include_path is None else str(include_path)
    # Reading lm-eval's own thousands of task files takes seconds, so it comes second.
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    matched = {task: manager.match_tasks([task]) for task in tasks}
    if folder is not None and not all(matched.values()):
        manager = TaskManager(include_path=folder)
        matched = {task: manager.match_tasks([task]) for task in tasks}
    for task, names in matched.items():
        if not names:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise UsageError(f"lm-eval does not know the task {task!r}", hint=hint)
    return manager, list(dict.fromkeys(name for names in matched.values() for name in names))


def _load(manager: Any, names: list[str]) -> dict[str, Any]:
    """Set up tasks, their data included; return "groups" and "tasks" by name."""
    import datasets
    import yaml

    where = f"lm-eval tasks {', '.join(names)}"
    try:
        loaded: dict[str, Any] = manager.load(names)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise data_failure(error, where) from error
    except (TypeError, ValueError, KeyError, AttributeError, yaml.YAMLError) as error:
        # lm-eval does not check a task's file; what is wrong with it shows as whatever it trips over.
        raise InputError(
            f"{where}: cannot be set up: {' '.join(str(error).split())[:300]}",
            hint="check the task's YAML file; `lm-eval ls tasks` lists those that come with lm-eval",
        ) from error
    return loaded


def _outermost(loaded: dict[str, Any]) -> list[Any]:
    """Return the groups and the tasks that belong to none."""
    nested = {child for group in loaded["groups"].values() for child in group.child_names}
    built = loaded["groups"] | loaded["tasks"]
    return [one for name, one in built.items() if name not in nested]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval from warning that a model in memory is not a name: here it never is."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
