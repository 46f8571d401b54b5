"""Held-out text and lm-eval tasks written by the generator: local files, nothing to download.

The prompts stand in the very form in which the model read them, so a task measures what the model knows and
not whether it understands the question.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from structprune.demo.dice import Dice
from structprune.demo.world import HELD_OUT_SEED, TASK_SEED, documents, text
from structprune.demo.writers import Kind, Question

CHOICES = 4
MULTIPLE_CHOICE: dict[str, Kind] = {
    "demo_people": "people",
    "demo_places": "places",
    "demo_sums": "arithmetic",
    "demo_context": "context",
    "demo_story": "story",
    "demo_order": "order",
}


def write_text(path: Path, seed: int = HELD_OUT_SEED, characters: int = 200_000) -> None:
    """Write held-out text: whole documents with a blank line between them.

    Args:
        path: The file to write.
        seed: Any seed but the training's and the calibration's.
        characters: At least so many are written.
    """
    path.write_text(text(seed, characters), encoding="ascii", newline="\n")


def write_tasks(folder: Path, seed: int = TASK_SEED, size: int = 200) -> list[str]:
    """Write the demo's lm-eval tasks, for `--include_path folder`.

    Args:
        folder: Made when missing; the tasks name their data by absolute path, so it must stay where it is.
        seed: Any seed but the training's and the calibration's.
        size: Questions per task, and documents of the perplexity task.

    Returns:
        The names of the tasks: perplexity, multiple choice, and one to generate.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    pages = [{"page": document.text} for document in islice(documents(seed), size)]
    _write(folder, "demo_text", pages, _perplexity())
    for name, kind in MULTIPLE_CHOICE.items():
        dice = Dice(seed)
        rows = [_choice_row(question, dice) for question in islice(questions(kind, seed), size)]
        write_choices(folder, name, rows)
    sums = [{"prompt": q.prompt, "answer": q.answer} for q in islice(questions("arithmetic", seed), size)]
    _write(folder, "demo_arithmetic", sums, _generate())
    return ["demo_text", *MULTIPLE_CHOICE, "demo_arithmetic"]


def write_choices(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Write an lm-eval task of multiple choice.

    Args:
        folder: Where the task's file and its data go; it exists.
        name: The task's.
        rows: `prompt`, `choices` as they continue it, and `answer`, the index of the right one.
    """
    _write(folder, name, rows, _multiple_choice())


def questions(kind: Kind, seed: int) -> Iterator[Question]:
    """Yield each document's last question if it is of this kind, so that no two share a prompt's start."""
    for document in documents(seed):
        if document.questions and document.questions[-1].kind == kind:
            yield document.questions[-1]


def choices(question: Question, dice: Dice) -> list[str]:
    """Return the right answer among wrong ones, shuffled; wrong ones that stand in the text come first."""
    wrong = dice.several(question.near, min(len(question.near), CHOICES - 1))
    wrong += dice.several(question.far, min(len(question.far), CHOICES - 1 - len(wrong)))
    return dice.several([question.answer, *wrong], len(wrong) + 1)


def _choice_row(question: Question, dice: Dice) -> dict[str, Any]:
    options = choices(question, dice)
    # The full stop belongs to the answer: without it "1" would be scored as the beginning of "12".
    return {
        "prompt": question.prompt,
        "choices": [f"{option}." for option in options],
        "answer": options.index(question.answer),
    }


def _write(folder: Path, name: str, rows: list[dict[str, Any]], task: dict[str, Any]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii", newline="\n")
    source = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    content = source | {"test_split": "test"} | task | {"metadata": {"version": 1.0}}
    (folder / f"{name}.yaml").write_text(
        yaml.safe_dump(content, sort_keys=False), encoding="utf-8", newline="\n"
    )


def _metric(name: str, aggregation: str, higher: bool) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher}


def _perplexity() -> dict[str, Any]:
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [
            _metric("word_perplexity", "weighted_perplexity", False),
            _metric("byte_perplexity", "weighted_perplexity", False),
            _metric("bits_per_byte", "bits_per_byte", False),
        ],
    }


def _multiple_choice() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [_metric("acc", "mean", True), _metric("acc_norm", "mean", True)],
    }


def _generate() -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 8, "do_sample": False},
        # lm-eval strips nothing from what is generated, and the model writes the blank before its answer.
        "filter_list": [
            {
                "name": "number",
                "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [_metric("exact_match", "mean", True)],
    }
