"""The model card of a pruned folder, from its report: written with huggingface_hub, without any network."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

from structprune.report.figures import fraction
from structprune.report.report import table
from structprune.report.sentences import (
    about,
    calibration_sentence,
    goals_header,
    goals_rows,
    made_sentence,
    protocol_sentences,
    recovery_sentence,
)
from structprune.report.speed import speed_header, speed_notes, speed_rows
from structprune.storage.durable import DurableFile

CARD_FILE = "README.md"
# What a derived model may not drop or change, and what stays true of it.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def write_card(
    folder: Path, report: Mapping[str, Any], *, recipe: str, base: str, source: Path | None = None
) -> Path:
    """Write README.md of a pruned folder; return the file.

    Args:
        folder: Where to write; plots that already stand in it are shown.
        report: The report of the run.
        recipe: The recipe that gives this result, as YAML.
        base: The source as the user named it: a hub name or a folder.
        source: The source's folder, whose own card says under which license it stands.

    Raises:
        EnvironmentFailure: The disk is full or the folder may not be written.
    """
    name = Path(report["output"]).name
    shown = _base_name(base)
    results = list(_results(report))
    referred = "referred" in (report.get("weights") or {})
    data = ModelCardData(
        base_model=shown,
        library_name="structprune" if referred else "transformers",
        tags=[
            "pruning",
            *(["sparse"] if report["sparsity"] else []),
            "structprune",
            *str(report["method"]).split("+"),
        ],
        model_name=name,
        eval_results=results or None,
        **({"pipeline_tag": report.get("task", "text-generation")} | _inherited(source)),
    )
    if not results:
        data.pop("model_name")
    body = "\n\n".join(_sections(folder, report, name, shown, recipe))
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")
    with DurableFile(folder / CARD_FILE) as file:
        file.write(str(card).encode())
    return folder / CARD_FILE


def _sections(folder: Path, report: Mapping[str, Any], name: str, base: str, recipe: str) -> Iterator[str]:
    made_by = f"structprune {report['versions'].get('structprune') or ''}".rstrip()
    yield f"# {name}"
    yield f"`{base}`, pruned with **{report['method']}** by {made_by}."
    yield from about(report, base)
    yield "## Dense and pruned"
    yield _markdown(("", "dense", "pruned"), table(report))
    yield from protocol_sentences(report)
    if speed := report.get("bench"):
        yield "## Speed, memory, bytes"
        yield _markdown(speed_header(speed, "pruned"), speed_rows(speed))
        yield from (f"{note}." for note in speed_notes(speed))
    yield "## Asked and achieved"
    yield _markdown(goals_header(report), goals_rows(report))
    if report["sparsity"]:
        yield f"Zeros in the pruned matrices: {fraction(report['sparsity'])}, pattern {report['pattern']}."
    yield from (
        f"![{path.stem.replace('_', ' ')}]({path.relative_to(folder).as_posix()})"
        for path in sorted(folder.glob("structprune/plots/*.png"))
    )
    yield "## Loads in (tested)"
    yield "\n".join(f"- {loader}" for loader in report["loads_in"]) or "Not tested."
    checks = report["verification"]["checks"]
    yield _markdown(
        ("check", "holds", "found"),
        [(row["name"], "yes" if row["ok"] else "**no**", row["detail"]) for row in checks],
    )
    yield "## Calibration and training" if report.get("recovery") else "## Calibration"
    yield f"{calibration_sentence(report)} {recovery_sentence(report)}".strip()
    yield from _continuations(report)
    yield "## Reproduce"
    command = report.get("command", "prune")
    yield f"Save the recipe as `recipe.yaml` and run `structprune {command} recipe.yaml`, with {made_by}."
    yield f"```yaml\n{recipe.strip()}\n```"
    yield made_sentence(report)


def _continuations(report: Mapping[str, Any]) -> Iterator[str]:
    written = (report["evaluation"] or {}).get("generations") or ()
    if written:
        yield "## What both models write"
    for one in written:
        # As JSON text: a continuation may hold anything that Markdown would take for its own.
        parts = {
            which: json.dumps(one.get(which), ensure_ascii=False) for which in ("prompt", "dense", "model")
        }
        yield f"```text\nprompt: {parts['prompt']}\ndense:  {parts['dense']}\npruned: {parts['model']}\n```"


def _results(report: Mapping[str, Any]) -> Iterator[EvalResult]:
    evaluation = report["evaluation"] or {}
    for name, figures in evaluation.get("perplexity", {}).items():
        if figures["model"] is not None:
            yield _result(name, "perplexity", figures["model"])
    for task, metrics in evaluation.get("tasks", {}).items():
        for metric, figures in metrics.items():
            if figures["model"] is not None and not metric.partition(",")[0].endswith("_stderr"):
                yield _result(task, metric, figures["model"])


def _result(dataset: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=dataset,
        metric_type=metric.partition(",")[0],
        metric_name=metric,
        metric_value=round(value, 6),
    )


def _inherited(source: Path | None) -> dict[str, Any]:
    """Return what the source's own card says about license and language; {} where it has no valid card."""
    card = None if source is None else source / CARD_FILE
    if card is None or not card.is_file():
        return {}
    try:
        found = metadata_load(card)
    except (ValueError, yaml.YAMLError):
        return {}
    return {key: found[key] for key in INHERITED if key in found} if isinstance(found, dict) else {}


def _base_name(base: str) -> str:
    """Return a hub name as it is, of a folder only its name: where it lay is nobody's business."""
    return Path(base).resolve().name if Path(base).exists() or base.count("/") != 1 else base


def _markdown(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |" for line in lines)
