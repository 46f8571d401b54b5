"""Files against model: every tensor that the class needs is there, in its shape, and nothing else."""

import logging
import re
from collections.abc import Callable, Mapping, Set
from types import MappingProxyType

import torch

from structprune.errors import InputError, counted
from structprune.models.edited_reader import Reader
from structprune.storage.header import DTYPE_NAMES

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"(.*?\.)?(\d+)\.")


def check(
    reader: Reader,
    expected: Mapping[str, tuple[int, ...]],
    ignored: Callable[[str], bool],
    tied: Mapping[str, str] = MappingProxyType({}),
    *,
    strict: bool = True,
) -> None:
    """Compare the tensors in the files with those that the model's class needs under this configuration.

    Args:
        reader: The opened folder.
        expected: Name in the files -> shape, tied tensors once.
        ignored: Tells whether the class itself passes over a tensor when it loads.
        tied: Name in the files that repeats a tied tensor -> the name that it repeats.
        strict: Refuse extra tensors; else they are warned of.

    Raises:
        InputError: Missing or extra tensors, another number of blocks, shapes that differ, a size of zero,
            integers where weights belong, or tied tensors with different values.
    """
    found = {name for name in reader.tensors if name in expected or name in tied or not ignored(name)}
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and name not in tied]
    if extra and not missing and not strict:
        logger.warning("%s: not part of the model, passed over: %s", reader.folder, ", ".join(extra[:5]))
    elif missing or extra:
        _refuse_other_depth(reader, set(expected), found)
        _refuse_names(reader, missing, sorted(extra))
    _refuse_shapes(reader, expected)
    for name in expected:
        info = reader.tensors[name]
        place = f"{reader.folder / info.file}: tensor {name!r}"
        if 0 in info.shape:
            raise InputError(
                f"{place} has the shape {list(info.shape)}, one size is zero",
                hint="a model with a part of size zero cannot be pruned",
            )
        if not info.dtype.is_floating_point:
            raise InputError(
                f"{place} is {DTYPE_NAMES[info.dtype]}, expected floating point",
                hint="a quantised model must be dequantised first",
            )
    for repeated, name in tied.items():
        if repeated in reader.tensors and name in reader.tensors:
            _compare_tied(reader, repeated, name)


def _refuse_other_depth(reader: Reader, expected: Set[str], found: Set[str]) -> None:
    """Say "32 blocks, not 24" where that is what hundreds of missing or extra names come down to."""
    wanted, held = _numbers(expected), _numbers(found)
    for prefix in sorted(wanted.keys() | held.keys()):
        described, stored = wanted.get(prefix, set()), held.get(prefix, set())
        if described and stored and described != stored:
            raise InputError(
                f"{reader.folder}: config.json describes {counted(len(described), 'block')} under "
                f"{prefix!r}, "
                f"the files hold {len(stored)} (in one but not the other: {_spans(described ^ stored)})",
                hint="config.json and weights belong to different models, or a shard is missing",
            )


def _numbers(names: Set[str]) -> dict[str, set[int]]:
    numbers: dict[str, set[int]] = {}
    for name in names:
        if match := _NUMBERED.match(name):
            numbers.setdefault(match[1] or "", set()).add(int(match[2]))
    return numbers


def _spans(numbers: Set[int]) -> str:
    ordered = sorted(numbers)
    starts = [number for number in ordered if number - 1 not in numbers]
    ends = [number for number in ordered if number + 1 not in numbers]
    spans = [f"{low}" if low == high else f"{low}-{high}" for low, high in zip(starts, ends, strict=True)]
    return ", ".join(spans[:5]) + (" ..." if len(spans) > 5 else "")


def _refuse_names(reader: Reader, missing: list[str], extra: list[str]) -> None:
    problems = []
    for kind, names in (("missing", missing), ("not part of the model", extra)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{kind}: {', '.join(repr(name) for name in names[:5])}{more}")
    raise InputError(
        f"{reader.folder}: the tensors in the files are not those of config.json: {'; '.join(problems)}",
        hint="config.json and weights belong to different models, or the files are damaged",
    )


def _refuse_shapes(reader: Reader, expected: Mapping[str, tuple[int, ...]]) -> None:
    other = [
        f"{name!r} is {list(reader.tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if reader.tensors[name].shape != tuple(shape)
    ]
    if other:
        raise InputError(
            f"{reader.folder}: {counted(len(other), 'tensor')} of another shape than config.json asks for: "
            + "; ".join(other[:5]),
            hint="config.json and weights belong to different models",
        )


def _compare_tied(reader: Reader, repeated: str, name: str) -> None:
    first, second = reader.tensors[repeated], reader.tensors[name]
    if first.shape != second.shape or first.dtype != second.dtype:
        found = " and ".join(f"{list(info.shape)} {DTYPE_NAMES[info.dtype]}" for info in (first, second))
    elif not torch.equal(reader.read(repeated), reader.read(name)):
        found = "different values"
    else:
        return
    raise InputError(
        f"{reader.folder}: config.json ties {repeated!r} to {name!r}, but the files hold {found}",
        hint='set "tie_word_embeddings": false in a copy of the model if both are meant',
    )
