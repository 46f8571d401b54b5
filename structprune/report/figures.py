"""Figures as people read them and as JSON can hold them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def number(value: float | None) -> str:
    """Return a figure with four digits, or "-" where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"


def bytes_text(count: float) -> str:
    """Return a size in the unit that people would use, in powers of 1000: "269 MB"."""
    return scaled(count, ("bytes", "kB", "MB", "GB", "TB"))


def scaled(count: float, units: Sequence[str]) -> str:
    """Return a count with three digits in one of `units`, each a thousand of the one before it."""
    power = 0
    # 999.6 would be written as 1000 of its unit.
    while count >= 999.5 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {units[power]}"


def fraction(value: float | str | None) -> str:
    """Return a sparsity as people write it: "50.00%", or "2:4" as it is."""
    return value if isinstance(value, str) else percent(value, digits=2)


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as percent, or "-" where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}%}"


def prunable(unit: str) -> str:
    """Return what the share of a stage is a share of: never of the whole model, but for visual tokens."""
    return f"prunable {unit}" if unit in ("weights", "parameters") else unit


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: no NaN, no infinity, text for what JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def question_rows(questions: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (what, dense, model) of answers to questions on images; "-" where no dense model answered."""
    rows = []
    for name, found in questions.items():
        shares = [(f"Right answers, {name}", found["accuracy"])]
        shares += [(f"Right answers, {name}, {kind}", one) for kind, one in found["kinds"].items()]
        rows += [(what, percent(one["dense"]), percent(one["model"])) for what, one in shares]
        if found["mcnemar"] is not None:
            kl = f"{number(found['kl'])} ± {number(found['kl_se'])}"
            only = found["mcnemar"]
            rows.append((f"KL from dense at the first answer token, {name}", "0", kl))
            rows.append((f"Right by one alone, {name}", str(only["dense_only"]), str(only["model_only"])))
            rows.append((f"McNemar's exact p, {name}", "-", number(only["p"])))
    return rows
