"""The one way to say how much is removed: a fraction of the weights, or an "N:M" pattern with N kept."""

import re
from decimal import Decimal
from fractions import Fraction
from math import floor
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from structprune.errors import UsageError

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d{1,3})?", re.ASCII)
# Four digits: no pattern is wider, and int() refuses a text of more than 4300.
PATTERN = re.compile(r"(\d{1,4})\s*:\s*(\d{1,4})", re.ASCII)
EXPECTED = 'a fraction removed in [0, 1) such as 0.5 or "50%", or a pattern "N:M" with N of every M kept'
# YAML 1.1 reads an unquoted a:b (b below 60) as a * 60 + b; these are the group sizes that anybody uses.
GROUP_SIZES = (2, 4, 8, 16, 32)


def parse_sparsity(value: object) -> float | str:
    """Turn what a user wrote (0.5, "0.5", "50%", "2:4") into a float in [0, 1) or an "N:M" string.

    Raises:
        ValueError: Not a sparsity; the text says what was found, what is expected and, where it can be
            guessed, what was meant.
    """
    match value:
        case bool():  # an int in Python; YAML 1.1 reads `no` as False
            pass
        case int() | float():
            return _fraction(value, shown=_shown(value))
        case str():
            return _parse(value.strip())
    raise ValueError(f"{value!r:.40} is not a sparsity; expected {EXPECTED}")


Sparsity = Annotated[float | str, BeforeValidator(parse_sparsity)]
"""A pydantic field type: the fraction removed, in [0, 1), or "N:M", N of every M consecutive inputs kept."""


def share_below(part: int, of: int) -> str:
    """Return a share as a number that may be asked for: four digits, rounded down."""
    return f"{floor(Fraction(part, of) * 10000) / 10000:g}"


def _needs_groups(value: float | str) -> float | str:
    if fraction_of(value) and pattern_of(value) is None:
        raise ValueError(f'found {value!r:.40}, this method needs a pattern "N:M" such as "2:4"')
    return value


Pattern = Annotated[float | str, BeforeValidator(parse_sparsity), AfterValidator(_needs_groups)]
"""A pydantic field type: "N:M", N of every M consecutive inputs kept, or 0 for nothing removed."""


def _needs_no_groups(value: object) -> float:
    share = parse_sparsity(value)
    if isinstance(share, str):
        raise ValueError(f'found {share!r}, this method takes a fraction removed such as 0.3 or "30%"')
    return share


Share = Annotated[float, BeforeValidator(_needs_no_groups)]
"""A pydantic field type: the fraction removed, in [0, 1)."""


Amount = float | str | Fraction | tuple[int, int]
"""How much leaves, as the solvers take it: a sparsity, an exact fraction, or (kept, of) of a pattern."""


def pattern_of(amount: Amount) -> tuple[int, int] | None:
    """Return (kept, of) of an "N:M" sparsity, or None when it is a fraction."""
    if isinstance(amount, tuple):
        return amount
    if not isinstance(amount, str):
        return None
    kept, of = amount.split(":")
    return int(kept), int(of)


def fraction_of(amount: Amount) -> Fraction:
    """Return the exact fraction removed: of the decimal number as it is written, so 0.29 is 29/100."""
    pattern = pattern_of(amount)
    if pattern is not None:
        kept, of = pattern
        return Fraction(of - kept, of)
    if isinstance(amount, Fraction):
        return amount
    # repr gives the shortest decimal that is this float: what the user typed, not its binary neighbour.
    return Fraction(repr(float(amount)))  # type: ignore[arg-type]  # patterns and fractions are done with


def check_groups(shape: tuple[int, ...], of: int) -> None:
    """Check that every row of a matrix [out, in] splits into whole groups of `of` inputs.

    Raises:
        UsageError: It does not; the caller adds the tensor's name.
    """
    if shape[-1] % of:
        raise UsageError(
            f"shape {list(shape)}: {shape[-1]} inputs do not divide into groups of {of}",
            hint="choose a pattern whose M divides the inputs, or exclude this matrix",
        )


def _parse(text: str) -> float | str:
    if match := PATTERN.fullmatch(text):
        return _pattern(int(match[1]), int(match[2]))
    number = text.removesuffix("%").rstrip().lower()
    if not NUMBER.fullmatch(number):
        raise ValueError(f"{text:.40} is not a sparsity; expected {EXPECTED}")
    if text.endswith("%"):
        # Through Decimal: float("29") / 100 need not be float("0.29").
        return _fraction(float(Decimal(number) / 100), shown=f"{text:.40}", guess=False)
    return _fraction(float(number), shown=f"{text:.40}")


def _pattern(kept: int, of: int) -> str:
    if 0 < kept < of:
        return f"{kept}:{of}"
    said = f'"{kept}:{of}" is not a pattern; "N:M" keeps N of every M consecutive inputs, 0 < N < M'
    if kept == of > 0:
        raise ValueError(f"{said}; to remove nothing say 0")
    raise ValueError(f'{said}; did you mean "{of}:{kept}"?' if 0 < of < kept else said)


def _fraction(value: float, *, shown: str, guess: bool = True) -> float:
    if 0 <= value < 1:
        return float(value) + 0.0  # -0.0 becomes 0.0
    meant = _guesses(value) if guess else ""
    if value == 1:
        meant = "; 1 would remove everything"
    raise ValueError(f"{shown} is not a sparsity; expected {EXPECTED}{meant}")


def _guesses(value: float) -> str:
    """Return what a number out of range was probably meant to be, as the end of a sentence."""
    if not 2 <= value < 3600:
        return ""
    found = [f"{float(Fraction(repr(value)) / 100)!r}"] if value < 100 else []
    kept, of = divmod(value, 60)
    if of in GROUP_SIZES and 0 < kept < of:
        found.append(f'"{int(kept)}:{int(of)}" in quotes (YAML reads it without them as {value:g})')
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _shown(value: float) -> str:
    # Python refuses to print an integer of more than 4300 digits.
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)
