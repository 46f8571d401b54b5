"""JSON read strictly: what two readers could understand differently is refused, with file and position.

Python's own reader accepts duplicate keys (the last one wins), NaN, Infinity and lone surrogates; a file that
relies on one of these means something else to another library, so it is damaged or hostile.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from structprune.errors import InputError
from structprune.storage.safe_open import read_whole

DAMAGED = "the file is damaged or was cut off; download it again"

# A configuration nests five levels; 64 leaves room and stays far away from Python's recursion limit.
MAX_DEPTH = 64

_STRING_OR_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity')


def read_json(path: Path, *, limit_bytes: int, root: Path | None = None) -> Any:
    """Read a JSON file of at most `limit_bytes` bytes.

    Args:
        path: A regular file, or a link that stays inside `root` (see `safe_open.check_link`).
        limit_bytes: Larger files are refused before they are read.
        root: The model folder; None where links may lead anywhere.

    Raises:
        InputError: Missing or too large; not UTF-8; not JSON; a duplicate key; NaN, Infinity or a number that
            is too large; nested deeper than `MAX_DEPTH`. The message names the file and, if known, the place.
    """
    value = parse_json(read_whole(path, limit_bytes=limit_bytes, root=root), str(path))
    _check_depth(value, str(path))
    return value


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON from bytes; `where` names the source in messages. The depth is limited by recursion only.

    Raises:
        InputError: As `read_json`, without the limits on size and depth.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8: byte {error.start} is 0x{data[error.start]:02x}",
            hint=DAMAGED,
        ) from None

    def refuse_constant(name: str) -> NoReturn:
        found = next((m.start() for m in _STRING_OR_CONSTANT.finditer(text) if m.group() == name), 0)
        line = text.count("\n", 0, found) + 1
        raise InputError(
            f"{where}: {name} at line {line} is not a JSON number", hint="write a finite number or null"
        )

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise InputError(
                f"{where}: the number {number[:40]} is too large for a float",
                hint="write a number that a float can hold",
            )
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise InputError(
                f"{where}: the key {twice!r} appears twice in one object", hint="keep one of the two"
            )
        return result

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant, parse_float=finite)
        if "\\u" in text:
            # Only an escape can smuggle in half of a surrogate pair, which no file name or hash can hold.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise InputError(
            f"{where}: JSON nested too deeply, at most {MAX_DEPTH} levels are read", hint=DAMAGED
        ) from None
    except UnicodeEncodeError:
        raise InputError(f"{where}: a \\u escape is half of a surrogate pair", hint=DAMAGED) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not valid JSON: {error.msg} at line {error.lineno} column {error.colno}",
            hint=DAMAGED,
        ) from None
    except ValueError as error:
        # Python refuses integers of more than 4300 digits.
        raise InputError(f"{where}: a number cannot be read: {str(error)[:80]}", hint=DAMAGED) from None
    return value


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for outer in level:
            if isinstance(outer, dict):
                inner.extend(outer.values())
            elif isinstance(outer, list):
                inner.extend(outer)
        level = inner
        if not level:
            return
    raise InputError(f"{where}: JSON nested too deeply, at most {MAX_DEPTH} levels are read", hint=DAMAGED)
