"""What a dry run says, in the words of people; the keys of its JSON stay as they are."""

from collections.abc import Mapping
from typing import Any

from structprune.cli.summary import key_lines
from structprune.cli.terminal import duration
from structprune.report.figures import bytes_text, percent, prunable

LESS = "--gradient-checkpointing, a smaller --batch-size and a smaller --length take less"
UNMEASURED = "told once `structprune bench --rates` has measured this machine"


def dry_run_lines(result: Mapping[str, Any]) -> str:
    """Return what a run would do and need, "key: value"; of several runs one after the other."""
    if "runs" in result:
        return key_lines({"runs": {name: _said(one) for name, one in result["runs"].items()}})
    return key_lines(_said(result))


def _said(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a forecast with what each of its figures is a share of, or is needed for."""
    # Writing, measuring and proving come on top, which nobody forecasts.
    memory = "memory to decide and time it" if result.get("bench") else "memory to decide"
    said = _renamed(result, memory)
    if "stages" in result:
        said["stages"] = [one | {"unit": prunable(one["unit"])} for one in result["stages"]]
    if "recover" in result:
        said["recover"] = _trained(result["recover"])
    if "plans" in result:  # a recovery alone, which decides nothing
        return said
    sizes = result.get("parameters", {"dense": 0, "pruned": 0})
    if sizes["pruned"] < sizes["dense"]:
        removed = percent(1 - sizes["pruned"] / sizes["dense"])
        said["parameters"] = {**sizes, "removed": f"{removed} of the model's"}
    if "ranks" in result:
        said["ranks"] = _renamed(result["ranks"], "memory to decide")
    said.pop("seconds", None)
    return said | {"time to decide": _time(result.get("seconds"))}


def _time(seconds: float | None) -> str:
    """Return how long something takes where nothing else runs."""
    return UNMEASURED if seconds is None else f"{duration(seconds)} at best"


def _trained(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what training takes."""
    said = _renamed(group, "memory to train")
    for key in ("seconds", "free_bytes", "state_bytes"):
        said.pop(key)
    if group["memory_bytes"] > group["free_bytes"]:
        said["memory to train"] += f", and {bytes_text(group['free_bytes'])} are free: {LESS}"
    return said | {"time to train": _time(group["seconds"])}


def _renamed(group: Mapping[str, Any], memory: str) -> dict[str, Any]:
    """Return a group of keys with another word for its bytes of memory."""
    return {
        memory if key == "memory_bytes" else key: bytes_text(value) if key == "memory_bytes" else value
        for key, value in group.items()
    }
