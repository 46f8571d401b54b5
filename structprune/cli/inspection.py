"""What `inspect` found, in words and units; hashes and exact figures stand in its JSON."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from structprune.cli.tables import table
from structprune.errors import counted
from structprune.report.figures import bytes_text, percent, scaled

Result = Mapping[str, Any]

RUNNING = "{} drops visual tokens while structprune runs it; under any other program nothing is saved"
ELSEWHERE = "those in {}: only structprune opens this folder"


def inspection_lines(result: Result) -> str:
    """Return what a model is, what it costs, and what each method can do with it."""
    return f"{table([row for row in _facts(result) if row[1]])}\n\n{table(_abilities(result['methods']))}"


def _facts(result: Result) -> Sequence[tuple[str, str]]:
    known = "a known family" if result["known_family"] else "not a known family: linears of repeated blocks"
    stored = f"{bytes_text(result['bytes'])} of {result['dtype']} in {counted(result['files'], 'file')}"
    parameters = f"{result['parameters']:,} parameters in {counted(result['blocks'], 'block')}, {stored}"
    prunable = f"{counted(result['prunable'], 'weight')} in {counted(result['linears'], 'linear')}"
    if result["parameters"]:
        prunable += f", {percent(result['prunable'] / result['parameters'])} of all parameters"
    experts = f"{counted(result['experts'], 'expert')} in all blocks together" if result["experts"] else ""
    constant, zeros = result["constant_matrices"], result["found"]["zeros"]
    return [
        ("model", f"{result['model']}: {result['class']} ({result['model_type']}), {known}"),
        ("size", parameters),
        ("prunable", prunable),
        ("experts", experts),
        ("pruned", result["pruned"] or ("no" if not zeros else f"no, {counted(zeros, 'weight')} are zero")),
        ("saving", RUNNING.format(" and ".join(running)) if (running := result["while_running"]) else ""),
        ("weights", ELSEWHERE.format(base) if (base := result["weights_in"]) else ""),
        (
            "constant",
            f"{counted(len(constant), 'matrix')} of one value only: {', '.join(constant[:3])}"
            if constant
            else "",
        ),
        ("text", _text(result)),
        ("embeddings", "tied to the head" if result["tied_embeddings"] else "not tied to the head"),
        ("cost", _cost(result)),
        ("N:M", ", ".join(result["patterns"]) or "none divides every matrix"),
    ]


def _text(result: Result) -> str:
    tokens = result["vocabulary"]
    known = "no tokenizer" if tokens is None else f"{counted(tokens, 'token')} in the vocabulary"
    limit = result["max_positions"]
    return f"{known}, {'no limit of positions' if limit is None else counted(limit, 'position')}"


def _cost(result: Result) -> str:
    if result["flops_per_token"] is None:
        return ""
    flops = scaled(result["flops_per_token"], ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"))
    cost = f"{flops} per token at length {result['length']:,}"
    cache = result["kv_bytes_per_token"]
    return cost if cache is None else f"{cost}, {bytes_text(cache)} of cache per token"


def _abilities(methods: Sequence[Result]) -> list[tuple[str, str, str]]:
    """Return what each method takes of this model; those that take nothing for one reason share a row."""
    rows, refused = [], defaultdict(list)
    for row in methods:
        if row["reason"]:
            refused[row["family"], row["reason"]].append(row)
            continue
        share = [_numbers(row["whole"]) if row["whole"] else "any fraction"] * row["fractions"]
        goals = [row["range"]] if row["range"] else [*share, *row["patterns"]]
        rows.append((row["name"], _data(row), ", ".join(goals)))
    for (family, reason), alike in refused.items():
        if len(alike) == 1:
            rows.append((alike[0]["name"], _data(alike[0]), f"no: {reason}"))
            continue
        every = len(alike) == sum(row["family"] == family for row in methods)
        names = "" if every else f" ({', '.join(row['name'] for row in alike)})"
        rows.append((counted(len(alike), f"{family} method"), "", f"no: {reason}{names}"))
    return rows


def _data(row: Result) -> str:
    return f"needs {row['reads']}" if row["needs_data"] else "no data"


def _numbers(whole: Result) -> str:
    """Return the numbers that a share comes down to: "1 to 4 of 5 blocks"."""
    numbers = "1" if whole["most"] == 1 else f"1 to {whole['most']}"
    return f"{numbers} of {whole['of']} {whole['units']}"
