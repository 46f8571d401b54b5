"""The result of a command in a few lines for people; `--json` prints the same result whole."""

from collections.abc import Mapping, Sequence
from typing import Any

from structprune.cli.tables import table, wrapped
from structprune.errors import counted
from structprune.report.figures import bytes_text, number, percent, prunable, question_rows
from structprune.report.sentences import seen_before
from structprune.report.speed import speed_header, speed_notes, speed_rows

Result = Mapping[str, Any]

# What became of weight files of which nothing changed.
WAYS = {
    "copied": "copied unchanged",
    "reflinked": "shared with the model's until either is edited",
    "linked": "hard links to the model's: an edit of one changes both",
    "referred": "not in the folder, only where they are",
}


def run_lines(result: Result) -> str:
    """Return what a run asked, got, where it lies and who can load it."""
    parameters, size = result["parameters"], result["bytes"]
    goals = [stage for stage in result.get("stages", ()) if "unit" in stage]
    got = [_reached(stage) for stage in goals] or [f"sparsity {_exact(result['sparsity'])}"]
    counts = f"{parameters['dense']:,} -> {parameters['pruned']:,}"
    if parameters["pruned"] < parameters["dense"]:
        removed = percent(1 - parameters["pruned"] / parameters["dense"])
        got.insert(0, f"{removed} of the model's parameters removed ({counts})")
    else:
        got.append(f"{counts} parameters")
    got.append(f"{size['dense']:,} -> {size['pruned']:,} bytes")
    got += _quality(result)
    where = (
        f"{result['output']} ({result['seconds']:.0f} s, peak memory {bytes_text(result['peak_rss_bytes'])})"
    )
    if result.get("blocks_resumed"):
        where += f", {counted(result['blocks_resumed'], 'block')} resumed"
    if result.get("kept"):
        where = f"{result['output']} (complete before this command, kept as it is)"
    found = result.get("found") or {"pruned": False}
    rows = [
        ("asked", ", ".join(f"{one['method']} {_exact(one['asked'])}" for one in goals) or result["method"]),
        *([("found", f"{_exact(found['sparsity'])} zero, {found['pattern']}")] if found["pruned"] else []),
        ("got", ", ".join(got)),
        *([("weights", told)] if (told := _unchanged(result.get("weights") or {})) else []),
        ("where", where),
        ("loads in", ", ".join(result["loads_in"]) or "nothing that was tried"),
    ]
    return table(rows)


def pruning_lines(result: Result) -> str:
    """Return what a recipe of `prune` led to, with what training gained where it recovers, too."""
    if not result.get("recovery"):
        return run_lines(result)
    row = "pruned", f"{result['pruned_folder']}, before it was trained; complete, too"
    return f"{recovery_lines(result)}\n{table([row])}"


def recovery_lines(result: Result) -> str:
    """Return what training gained, and the folder it was written to."""
    training = result["recovery"]
    loss = f"{number(training['start_loss'])} -> {number(training['best_loss'])} nats per token"
    read, last = training["data"], training["history"][-1]["step"]
    windows = counted(read["windows"], "window")
    rows = [
        ("trained", f"{counted(last, 'step')} on {windows} of {read['length']} tokens of {read['source']}"),
        ("held-out loss", f"{loss} after step {training['best_step']}"),
    ]
    if training.get("ranks"):
        ranks = training["ranks"].values()
        rows += [("ranks", f"{min(ranks)} to {max(ranks)}")]
    if training.get("steps_resumed"):
        rows += [("resumed", f"after {counted(training['steps_resumed'], 'step')}")]
    if "adapter" in result:
        rows += [("quality", ", ".join(_quality(result)))]
        rows += [("adapter", f"{result['output']} for {result['adapter']['base']}")]
        rows += [("loads in", ", ".join(result["loads_in"]))]
        return table([row for row in rows if row[1]])
    return f"{table(rows)}\n{run_lines(result)}"


def runs_lines(result: Result) -> str:
    """Return what several runs of one command did, one after the other."""
    return "\n\n".join(run_lines(run) for run in result["runs"].values())


def verification_lines(result: Result) -> str:
    """Return one line per check, and what was measured."""
    rows = [("ok" if check["ok"] else "FAILED", check["name"], check["detail"]) for check in result["checks"]]
    measured = (
        f"sparsity {_exact(result['sparsity'])}, {result['pattern']}, {result['parameters']:,} parameters"
    )
    return f"{table(rows)}\n{measured}"


def evaluation_lines(result: Result) -> str:
    """Return a table: what, dense, model."""
    rows: list[tuple[str, str, str]] = []
    for name, figures in result.get("perplexity", {}).items():
        rows.append((f"perplexity, {name}", number(figures.get("dense")), number(figures.get("model"))))
    for name, figures in result.get("divergence", {}).items():
        kl = f"{number(figures['kl'])} +- {number(figures['kl_se'])}"
        rows.append((f"KL from dense, nats per token, {name}", "0", kl))
        rows.append((f"same first choice as dense, {name}", "100%", percent(figures["top1_agreement"])))
    rows += question_rows(result.get("questions", {}))
    for task, metrics in result.get("tasks", {}).items():
        for metric, figures in metrics.items():
            rows.append((f"{task}, {metric}", number(figures.get("dense")), number(figures.get("model"))))
    return table(rows, ("", "dense", "model"))


def bench_lines(result: Result) -> str:
    """Return a table of both models' figures, and how they were measured."""
    notes = [wrapped(f"{note}.") for note in speed_notes(result)]
    return "\n".join([table(speed_rows(result), speed_header(result)), "", *notes])


def rates_lines(result: Result) -> str:
    """Return what this machine does in a second, and where that was measured."""
    rates, place = result["rates"], result["rates"]["place"]
    rows = [(f"products, {dtype}", f"{rate / 1e9:,.3g} GFLOP/s") for dtype, rate in rates["flops"].items()]
    for name, key in (("memory", "moved_bytes"), ("file", "read_bytes"), ("processes", "sent_bytes")):
        rows += [(name, f"{bytes_text(rates[key])}/s")] if rates[key] is not None else []
    rows += [(f"numbers {key}", f"{rates[key] / 1e6:,.3g} M/s") for key in ("squared", "ranked")]
    where = f"{place['processor']}, {place['device']}, {counted(place['threads'], 'thread')}"
    rows += [("measured", f"{where}, {counted(place['ranks'], 'rank')} at once")]
    return table([*rows, ("kept in", result["file"])])


def show_lines(result: Result) -> str:
    """Return how many tokens are left from where on, and where the picture is."""
    of = result["tokens"]
    rows = [
        (f"{one['place']} block {one['block']}", f"{one['kept']} of {of} visual tokens kept")
        for one in result["drops"]
    ]
    return table([*rows, ("where", result["output"])])


def report_lines(result: Result) -> str:
    """Return which runs are on a page, and where it is."""
    rows = [("run", f"{one['name']}, {one['method']}") for one in result["runs"]]
    return table([*rows, ("where", result["output"])])


def methods_lines(result: Result) -> str:
    """Return one line per method."""
    return table([(row["name"], row["family"], row["about"]) for row in result["methods"]])


def method_lines(result: Result) -> str:
    """Return one method: what it does, where it comes from, its fields with their defaults."""
    fields = [
        (f"  {row['name']}", row["type"], f"= {_plain(row['default'])}", row["about"])
        for row in result["fields"]
    ]
    data = "needs calibration data" if result["needs_data"] else "needs no data"
    said = [result["about"], f"Source: {result['source']}", f"{result['family']} pruner, {data}"]
    return "\n".join([*(wrapped(line) for line in said), "", table(fields)])


def export_lines(result: Result) -> str:
    """Return what an export wrote and what it saved, in a few lines."""
    dense, packed = result["bytes"]["dense"], result["bytes"]["packed"]
    where = f"{result['output']} ({result['seconds']:.0f} s)"
    if result["to"] == "dense":
        files = f"{counted(len(result['files']), 'weight file')}, the bytes that were packed"
        return table([("got", f"{packed:,} -> {dense:,} bytes"), ("proved", files), ("where", where)])
    linears = result["linears"]
    share = linears["packed_bytes"] / linears["dense_bytes"]
    rows = [
        ("got", f"{dense:,} -> {packed:,} bytes"),
        (
            "packed",
            f"{counted(linears['packed'], 'linear')} as {result['to']}, {share:.2%} of the dense bytes",
        ),
        ("as they were", f"{counted(len(result['left']), 'tensor')}, {_reasons(result['left'])}"),
        ("proved", "every tensor unpacks to its bits"),
        ("where", where),
        ("loads in", "nothing as it is; `structprune export DEST DENSE --to dense` gives the model back"),
    ]
    return table(rows)


def key_lines(result: Result) -> str:
    """Return any result as indented lines, "key: value"."""
    return "\n".join(_lines(result, ""))


def _reached(stage: Result) -> str:
    """Return what a stage removed as measured, and what whole units allow where that is something else."""
    if left := stage.get("while_running"):
        if "tokens" not in left:  # a plan that was made before it told
            return f"{stage['asked']} of the visual tokens, only while structprune runs it"
        cost = f"{_exact(left['visual_flops'])} of their operations"
        if "image_flops" in left:
            tokens = f"{left['tokens']} of {left['visual_tokens']} visual tokens of an image left at the end"
            cost += f" ({_exact(left['image_flops'])} with the tower)"
        else:  # how many there are depends on the image
            tokens = f"{stage['asked']} of the visual tokens left"
            cost = f"of {left['visual_tokens']} in an image {cost}"
        return f"{tokens}, {cost}, only while structprune runs it"
    if stage["measured"] is None:  # the files that it was measured against are not those of this run
        return f"{_exact(stage['reachable'])} of the {prunable(stage['unit'])} removed before"
    removed = f"{_exact(stage['measured'])} of the {prunable(stage['unit'])} removed"
    if stage["measured"] == stage["reachable"]:
        return removed
    return f"{removed} ({_exact(stage['reachable'])} reachable)"


def _unchanged(weights: Mapping[str, int]) -> str:
    """Return what became of weight files of which nothing changed; "" where there are none."""
    said = [f"{WAYS[way]} ({bytes_text(size)})" for way, size in weights.items() if way in WAYS]
    return ", ".join(said and [*said, *(["the others written anew"] * ("written" in weights))])


def _reasons(left: list[Mapping[str, str]]) -> str:
    """Return why tensors were left, and how many for each reason."""
    linears = [row for row in left if row["reason"] != "no linear of a decoder block"]
    if not linears:
        return "none of them a linear of a decoder block"
    return f"{len(linears)} of them in decoder blocks, such as {linears[0]['name']}: {linears[0]['reason']}"


def _quality(result: Result) -> list[str]:
    evaluation = result.get("evaluation") or {}
    texts = evaluation.get("protocol", {}).get("texts", {})
    found = []
    for name, figures in evaluation.get("perplexity", {}).items():
        scored = f"{name}{_how_scored(result, name, texts.get(name, {}))}"
        found.append(
            f"perplexity on {scored} {number(figures.get('dense'))} -> {number(figures.get('model'))}"
        )
    found += [f"KL {number(figures['kl'])}" for figures in evaluation.get("divergence", {}).values()]
    found += [
        f"right answers on {name} {percent(one['accuracy']['dense'])} -> {percent(one['accuracy']['model'])}"
        for name, one in evaluation.get("questions", {}).items()
    ]
    return found + list(evaluation.get("protocol", {}).get("flags", ()))


def _how_scored(result: Result, name: str, stamp: Mapping[str, Any]) -> str:
    """Return in brackets what a perplexity depends on most; two of different windows cannot be compared."""
    length = stamp.get("length")
    told = [seen_before(result, name), f"windows of {length} tokens" if length else ""]
    said = ", ".join(filter(None, told))
    return f" ({said})" if said else ""


def _exact(sparsity: object) -> str:
    """Return a fraction as percent without hiding that it is not round, and a pattern as it is."""
    return f"{sparsity * 100:.6g}%" if isinstance(sparsity, float) else str(sparsity)


def _lines(value: object, indent: str) -> list[str]:
    if isinstance(value, Mapping):
        lines = []
        for key, inner in value.items():
            if key == "bytes" and isinstance(inner, Mapping):
                lines.append(f"{indent}bytes: {' -> '.join(_plain(one, key) for one in inner.values())}")
            elif inner and _nests([inner]) and (isinstance(inner, Mapping) or _nests(inner)):
                lines += [f"{indent}{key}:", *_lines(inner, f"{indent}  ")]
            elif isinstance(inner, str) and "\n" in inner:
                lines += [f"{indent}{key}:", *_block(inner, f"{indent}  ")]
            else:
                lines.append(f"{indent}{key}: {_plain(inner, key)}")
        return lines
    if isinstance(value, list | tuple):
        return [
            line
            for inner in value
            for line in (_lines(inner, indent) if _nests([inner]) else [_plain(inner)])
        ]
    return [f"{indent}{_plain(value)}"]


def _block(text: str, indent: str) -> list[str]:
    return [f"{indent}{line}".rstrip() for line in text.rstrip().splitlines()]


def _nests(values: Sequence[object]) -> bool:
    return any(isinstance(value, Mapping | list | tuple) for value in values)


def _plain(value: object, key: str = "") -> str:
    """Return a value in words; `key` tells what is a number of bytes."""
    if value is None and key == "reachable":
        return "the data decides"
    if value is None or value == [] or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return bytes_text(value) if key.endswith("bytes") else f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(str(part) for part in value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {part}" for name, part in value.items()) + "}"
    return str(value)
