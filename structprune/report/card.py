"""The model card of a pruned folder, from its report: written with huggingface_hub, without any network."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

from structprune.report.figures import bytes_text, fraction
from structprune.report.report import table
from structprune.report.speed import speed_header, speed_notes, speed_rows
from structprune.storage.durable import DurableFile

CARD_FILE = "README.md"
NO_LOOK = "None: nothing is looked at before the model runs."
# What a derived model may not drop or change, and what stays true of it.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
ZEROS = (
    "The removed weights are stored as zeros in ordinary dense tensors. **This makes neither the files "
    "smaller nor dense kernels faster**: a program saves memory or time only when it uses the zeros. To get "
    "a smaller and faster model on every runtime, remove whole units (width, depth, experts)."
)
SMALLER = (
    "It has {fewer:,} parameters fewer than the {dense:,} of the dense model: the files are smaller, and "
    "every runtime that opens them has less to compute."
)
RUNNING = (
    "{method} lets structprune compute fewer visual tokens while it runs the model{left}. **The saving "
    "exists only under structprune**: nothing of it is in the weights, and any other program that opens the "
    "folder computes every token."
)
LEFT = (
    ": of the {visual_tokens} of an image {tokens} are left in the last block and {avg_tokens:.4g} in a "
    "block on average, which is {visual_flops:.2%} of the operations that they cost there{tower}; to choose "
    "them costs {selection_flops:.2%} ({counted})"
)
WITH_TOWER = ", and {image_flops:.2%} with the vision tower"
# Of weight files that no stage changed: what they are in this folder.
WAYS = {
    "copied": "a copy of those of `{base}`, byte for byte",
    "reflinked": "those of `{base}`, byte for byte; the file system keeps them once until either is edited",
    "linked": "hard links to those of `{base}`: **an edit of one is an edit of both**",
    "referred": "those of `{base}`, and not in this folder: it holds their place and their sha256. **Only "
    "structprune opens it**, as long as they are there and unchanged",
}
PATTERN = (
    " The {pattern} pattern holds in every pruned matrix; hardware with support for it can use it, after the "
    "weights were converted to its own format."
)


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
    if before := _before(report):
        yield before
    pattern = report["pattern"]
    sizes = report["parameters"]
    if sizes["pruned"] < sizes["dense"]:
        yield SMALLER.format(fewer=sizes["dense"] - sizes["pruned"], dense=sizes["dense"])
    if report["sparsity"]:
        yield ZEROS + (PATTERN.format(pattern=pattern) if ":" in str(pattern) else "")
    running = [stage for stage in report.get("stages", ()) if "while_running" in stage]
    for stage in running:
        left = stage["while_running"]
        tower = WITH_TOWER.format(**left) if "image_flops" in left else ""
        told = LEFT.format(tower=tower, **left) if "tokens" in left else ""
        yield RUNNING.format(method=stage["method"], left=told)
    yield from _unchanged(report, base)
    yield from (f"Note: {stage['note']}." for stage in report.get("stages", ()) if "note" in stage)
    yield "## Dense and pruned"
    yield _markdown(("", "dense", "pruned"), table(report))
    yield from _protocol(report)
    if speed := report.get("bench"):
        yield "## Speed, memory, bytes"
        yield _markdown(speed_header(speed, "pruned"), speed_rows(speed))
        yield from (f"{note}." for note in speed_notes(speed))
    yield "## Asked and achieved"
    goals = [
        (
            stage["method"],
            stage["unit"],
            *(fraction(stage.get(what)) for what in ("asked", "reachable", "measured")),
        )
        for stage in report.get("stages", ())
        if "unit" in stage
    ]
    # What a running model computes is counted while it runs.
    measured = "measured" if running else "measured from the files"
    yield _markdown(("stage", "removed", "asked", "reachable", measured), goals)
    if report["sparsity"]:
        yield f"Zeros in the pruned matrices: {fraction(report['sparsity'])}, pattern {pattern}."
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
    yield "## Calibration"
    yield NO_LOOK if running and not report["calibration"] else _calibration(report["calibration"])
    yield from _continuations(report)
    yield "## Reproduce"
    yield f"Save the recipe as `recipe.yaml` and run `structprune prune recipe.yaml`, with {made_by}."
    yield f"```yaml\n{recipe.strip()}\n```"
    versions = ", ".join(f"{key} {value}" for key, value in report["versions"].items() if value)
    machine = report["machine"]
    yield (
        f"Made in {report['seconds']:.0f} seconds on {machine['processor']} ({machine['threads']} threads), "
        f"with {versions}."
    )


def _before(report: Mapping[str, Any]) -> str:
    """Return what the model had lost before; "" of a dense one."""
    found = report.get("found") or {"pruned": False}
    if not found["pruned"]:
        return ""
    by = f", by structprune with {found['method']}" if found["method"] else ""
    return (
        f"It was pruned before: {fraction(found['sparsity'])} of the weights of its linears were zero, "
        f"pattern {found['pattern']}{by}. What was asked for and achieved counts these zeros."
    )


def _unchanged(report: Mapping[str, Any], base: str) -> Iterator[str]:
    """Yield one line per way in which weight files that nothing changed came into the folder."""
    weights = report.get("weights") or {}
    for way, said in WAYS.items():
        if way in weights:
            which = "Weight files" if "written" in weights else "The weight files"
            yield f"{which} of {bytes_text(weights[way])} are {said.format(base=base)}."


def _protocol(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line per text: a perplexity without its protocol cannot be compared with any other."""
    protocol = (report["evaluation"] or {}).get("protocol", {})
    for name, stamp in protocol.get("texts", {}).items():
        stride = "without overlap" if stamp.get("stride") is None else f"every {stamp['stride']} tokens"
        yield (
            f"Perplexity on {name}: {stamp.get('windows')} windows of {stamp.get('length')} tokens {stride}, "
            f"{stamp.get('scored_tokens')} tokens scored, beginning-of-sequence rule `{stamp.get('bos')}`, "
            f"computed in {stamp.get('dtype')}; sha256 of the {_hash_of(stamp)}. "
            "Divergence is the mean KL(dense || pruned) per token, ± one standard error over windows."
        )
    for name, stamp in protocol.get("questions", {}).items():
        yield (
            f"Answers on {name}: {stamp.get('questions')} questions on images, decoding "
            f"{stamp.get('decoding')}, right with {stamp.get('right')}, computed in {stamp.get('dtype')}; "
            f"sha256 of prompts and pixels `{str(stamp.get('sha256'))[:16]}`. McNemar's test asks whether "
            "the questions that only one of the two models gets right could be either's by chance."
        )
    for flag in protocol.get("flags", ()):
        yield f"Note: {flag}."


def _hash_of(stamp: Mapping[str, Any]) -> str:
    """Return what identifies a text: itself, or the tokens where only some of its windows were taken."""
    what, key = ("text", "sha256") if "sha256" in stamp else ("token ids", "tokens_sha256")
    return f"{what} `{str(stamp.get(key))[:16]}`"


def _calibration(facts: Mapping[str, Any] | None) -> str:
    if not facts:
        return "None: this method looks at the weights only."
    if facts.get("images"):
        return (
            f"{facts.get('samples')} questions on images, prompts of at most {facts.get('length')} tokens, "
            f"from `{facts.get('source')}` (seed {facts.get('seed')}; sha256 of prompts and pixels "
            f"`{str(facts.get('sha256'))[:16]}`). What these do not show may have suffered more than these "
            "figures say."
        )
    return (
        f"{facts.get('samples')} samples of {facts.get('length')} tokens from `{facts.get('source')}` "
        f"(seed {facts.get('seed')}; sha256 of the token ids `{str(facts.get('sha256'))[:16]}`). What these "
        "texts do not show, such as other languages or code, may have suffered more than these figures say."
    )


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
