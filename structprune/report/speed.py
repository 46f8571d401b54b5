"""What `bench` measured, as rows for people: a spread beside every median."""

from collections.abc import Mapping, Sequence
from typing import Any

from structprune.report.figures import bytes_text

Result = Mapping[str, Any]

# Figure -> what it is called, and by how much its numbers are multiplied for people.
TIMED = {
    "prefill_tokens_per_second": ("prefill, tokens/s", 1),
    "decode_tokens_per_second": ("decode, tokens/s", 1),
    "first_token_seconds": ("time to first token, ms", 1000),
}
COUNTED = {"peak_memory_bytes": "peak memory", "kv_bytes": "KV cache"}


def speed_header(result: Result, model: str = "model") -> tuple[str, ...]:
    """Return what stands above each column; "dense" only above a model that nothing was removed from.

    Args:
        result: What `bench` returned.
        model: What the measured model is called.
    """
    compared = result["models"]["compared"]
    if compared is None:
        return ("", model)
    return ("", "compared" if compared["pruned"] else "dense", model, "ratio")


def speed_rows(result: Result) -> list[tuple[str, ...]]:
    """Return the rows below that header: medians with the lowest and highest round, and the ratio."""
    facts = [result["models"][which] for which in ("compared", "model") if result["models"][which]]
    rows = [_sizes("weight files", [one["file_bytes"] for one in facts])]
    for batch in result["batches"]:
        label = f"batch {batch['batch']}: "
        for key, (name, scale) in TIMED.items():
            spreads = [(batch[key]["compared"], scale, ""), (batch[key]["model"], scale, "")]
            spreads.append((batch[key]["speedup"], 1, "x"))
            rows.append((label + name, *(_spread(*one) for one in spreads if one[0])))
        for key, name in COUNTED.items():
            values = [batch[key]["compared"], batch[key]["model"]]
            rows.append(_sizes(label + name, values[-len(facts) :]))
    return rows


def speed_notes(result: Result) -> list[str]:
    """Return sentences about how the figures were measured."""
    how = result["protocol"]
    where = ", ".join(how["accelerators"]) if how["device"].startswith("cuda") else how["processor"]
    said = (
        f"Prompts of {how['length']} tokens, {how['new']} new ones, {how['dtype']} on {how['device']} "
        f"({where}, {how['threads']} threads); median (lowest to highest) of {how['repeats']} rounds, "
        "in each of which every model runs once"
    )
    cache = f"The cache holds {how['cached_tokens']} tokens per prompt; peak memory: {how['peak_memory']}"
    return [said, cache, *result["flags"]]


def _sizes(name: str, values: Sequence[int | None]) -> tuple[str, ...]:
    shown = ["-" if one is None else bytes_text(one) for one in values]
    if len(values) == 1:
        return (name, *shown)
    compared, model = values
    return (name, *shown, f"{_figure(model / compared)}x" if model is not None and compared else "-")


def _spread(found: Mapping[str, float], scale: float, unit: str) -> str:
    median, low, high = (_figure(scale * found[which]) for which in ("median", "low", "high"))
    return f"{median}{unit} ({low} to {high})"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
