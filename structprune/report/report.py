"""The report of a prune run: one dictionary, for report.json, the card, the plots and the terminal.

A number that is not finite becomes null: NaN is not JSON, and other readers stop at it.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from structprune.errors import InputError
from structprune.machine import machine, peak_rss, versions
from structprune.proof.verification import Verification
from structprune.report.figures import fraction, number, percent, plain, question_rows
from structprune.storage.durable import DurableFile
from structprune.storage.strict_json import read_json

REPORT_FILE = "structprune/report.json"
# A thousand blocks with a table each stay far below.
REPORT_LIMIT = 2**26
# Where a text came from does not change a figure; its hash stands beside.
PROVENANCE = ("source", "column", "split", "revision")


@dataclass(frozen=True)
class Size:
    """How large the dense model is.

    Args:
        parameters: All parameters, tied ones once.
        bytes: Bytes of the weight files.
    """

    parameters: int
    bytes: int


@dataclass(frozen=True)
class RunRecord:
    """What a run did.

    Attributes:
        method: Name of the method, or of several joined with "+".
        recipe: The recipe, as YAML.
        command: Whose recipe that is: "prune", "apply" or "recover".
        stages: What each stage was: folder, method, config, plan id, its goal ("unit", "asked", "reachable")
            and whatever the run adds.
        calibration: Where the calibration tokens of the stages came from, also where an earlier run read
            them; None for a method without data, or where nobody knows.
        blocks_resumed: Blocks that an earlier, interrupted run had decided.
        revalued: Stored tensors whose kept weights changed on purpose.
        more: What else stands in the report.
    """

    method: str
    recipe: str = ""
    command: str = "prune"
    stages: Sequence[Mapping[str, Any]] = ()
    calibration: Mapping[str, Any] | None = None
    blocks_resumed: int = 0
    revalued: Collection[str] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


def build(
    verification: Verification,
    record: RunRecord,
    *,
    output: Path,
    dense: Size,
    seconds: float,
    evaluation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Put a report together; sparsity, parameters and bytes of the result are the ones `verify` measured.

    Args:
        verification: What was measured from the files of the output.
        record: What the run did; what was measured of each stage's goal is added.
        output: The output folder, as the user will find it.
        dense: Size of the source.
        seconds: Wall time of the run.
        evaluation: What `evaluate` returned as JSON, its "generations" beside; None when not asked for.
    """
    measured = verification.as_json()
    blocks, left = measured.pop("blocks"), measured.pop("stages")
    report = {
        "output": str(output),
        "method": record.method,
        "command": record.command,
        "sparsity": verification.sparsity,
        "pattern": verification.pattern,
        "parameters": {
            "dense": dense.parameters,
            "pruned": verification.parameters,
            "nonzero": verification.nonzero,
        },
        "bytes": {"dense": dense.bytes, "pruned": verification.bytes},
        "seconds": round(seconds, 3),
        "peak_rss_bytes": peak_rss(),
        "blocks_resumed": record.blocks_resumed,
        "loads_in": verification.loads_in,
        "blocks": blocks,
        "verification": measured,
        "evaluation": evaluation,
        "calibration": record.calibration,
        "stages": [{**stage, "measured": left.get(stage["folder"])} for stage in record.stages],
        "machine": machine(),
        "versions": versions(),
    }
    finite = plain(report)
    assert isinstance(finite, dict)
    return finite


def write_report(folder: Path, report: Mapping[str, Any]) -> Path:
    """Write a report as structprune/report.json of an output folder; return the file.

    Raises:
        EnvironmentFailure: The disk is full or the folder may not be written.
    """
    path = folder / REPORT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(report), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with DurableFile(path) as file:
        file.write(text.encode())
    return path


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of an output folder.

    Raises:
        InputError: It is missing or damaged.
    """
    found = read_json(folder / REPORT_FILE, limit_bytes=REPORT_LIMIT, root=folder)
    if not isinstance(found, dict):
        raise InputError(
            f"{folder / REPORT_FILE}: found no object", hint="the file was changed; create the folder again"
        )
    return found


class TableRow(NamedTuple):
    """One figure of both models.

    Attributes:
        what: What was measured.
        dense: Of the dense model; "-" where it was not measured.
        pruned: Of the pruned one.
        how: How it was measured, in a few words; "" of what is counted.
        footing: The dense model and the protocol; figures of one footing may be compared.
    """

    what: str
    dense: str
    pruned: str
    how: str = ""
    footing: str = ""


def table(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (what, dense, pruned) for people: sizes, then quality where evaluated; "-" if not measured."""
    return [(row.what, row.dense, row.pruned) for row in table_rows(report)]


def table_rows(report: Mapping[str, Any]) -> list[TableRow]:
    """Return the figures of `table` with how they were measured."""
    parameters, size = report["parameters"], report["bytes"]
    before = report.get("found") or {"pruned": False}
    sizes = [("Parameters", f"{parameters['dense']:,}", f"{parameters['pruned']:,}")]
    if report["sparsity"]:  # where whole units left, there are no zeros to tell of
        zeros = fraction(before["sparsity"]) if before["pruned"] else "-"
        sizes.append(("Parameters that are not zero", "-", f"{parameters['nonzero']:,}"))
        sizes.append(("Zeros in the pruned matrices", zeros, fraction(report["sparsity"])))
    sizes.append(("Bytes of the weight files", f"{size['dense']:,}", f"{size['pruned']:,}"))
    rows = [TableRow(*row, footing=footing(report)) for row in sizes]
    found = report.get("evaluation") or {}
    for kind, name, figures in _figures(found):
        how = _how(kind, found.get("protocol", {}).get(kind, {}).get(name, {}))
        rows += [TableRow(*row, how, footing(report, kind, name)) for row in figures]
    return rows


def footing(report: Mapping[str, Any], kind: str = "", name: str = "") -> str:
    """Return what figures of several runs must share before they may be compared, as text.

    Args:
        report: The report of a run.
        kind: "texts", "questions" or "tasks"; "" for what is counted in the files.
        name: Of the text, the questions or the task.
    """
    found = report.get("evaluation") or {}
    stamp = found.get("protocol", {}).get(kind, {}).get(name, {})
    shared = {key: value for key, value in stamp.items() if key not in (*PROVENANCE, "dense")}
    # What was measured after a run says itself which dense model it stands beside.
    size = stamp.get("dense") or {key: report[key]["dense"] for key in ("parameters", "bytes")}
    if kind == "texts":
        dense = [number(found.get("perplexity", {}).get(name, {}).get("dense"))]
    elif kind == "questions":
        dense = [number(found["questions"][name]["accuracy"]["dense"])]
    else:
        dense = [number(one["dense"]) for one in found["tasks"][name].values()] if name else []
    return json.dumps([size["parameters"], size["bytes"], kind, shared, dense])


def _figures(found: Mapping[str, Any]) -> Iterator[tuple[str, str, list[tuple[str, str, str]]]]:
    """Yield (kind, name, rows) of everything that both models were measured on."""
    for name, figures in found.get("perplexity", {}).items():
        rows = [(f"Perplexity, {name}", number(figures["dense"]), number(figures["model"]))]
        if name in found.get("divergence", {}):
            apart = found["divergence"][name]
            kl = f"{number(apart['kl'])} ± {number(apart['kl_se'])}"
            rows.append((f"KL from dense in nats per token, {name}", "0", kl))
            rows.append((f"Same first choice as dense, {name}", "100%", percent(apart["top1_agreement"])))
        yield "texts", name, rows
    for name, figures in found.get("questions", {}).items():
        yield "questions", name, question_rows({name: figures})
    for task, metrics in found.get("tasks", {}).items():
        yield (
            "tasks",
            task,
            [
                (f"{task}, {metric}", _scored(metrics, metric, "dense"), _scored(metrics, metric, "model"))
                for metric in metrics
                if not metric.partition(",")[0].endswith("_stderr")
            ],
        )


def _how(kind: str, stamp: Mapping[str, Any]) -> str:
    """Return in a few words how a figure was measured; "" where nobody said it."""
    if not stamp:
        return ""
    if kind == "texts":
        return f"{stamp.get('windows')} windows of {stamp.get('length')} tokens, {stamp.get('dtype')}"
    if kind == "questions":
        return f"{stamp.get('questions')} questions, {stamp.get('dtype')}"
    return f"{stamp.get('fewshot')}-shot, {stamp.get('samples')} documents"


def _scored(metrics: Mapping[str, Mapping[str, float | None]], metric: str, which: str) -> str:
    """Return a task's figure with its standard error where lm-eval gives one."""
    error = _error_of(metrics, metric).get(which)
    shown = number(metrics[metric].get(which))
    return shown if error is None or shown == "-" else f"{shown} ± {number(error)}"


def _error_of(metrics: Mapping[str, Mapping[str, float | None]], metric: str) -> Mapping[str, float | None]:
    """Return the standard errors of a metric; a filter's name stands behind a comma, "acc_stderr,filter"."""
    name, comma, chosen = metric.partition(",")
    return metrics.get(f"{name}_stderr{comma}{chosen}", {})
