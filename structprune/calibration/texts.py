"""Where text comes from: a local file, the built-in text, or a data set by name; all are read lazily."""

import codecs
import json
import re
import stat
from collections.abc import Iterable, Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from structprune.calibration.text_source import DEMO, SUFFIXES, TextSource
from structprune.errors import EnvironmentFailure, InputError, StructpruneError, UsageError
from structprune.storage import hub

PLAIN_FILE = "put the text itself there; folders, pipes and devices are not read"
AS_TEXT = "save it as UTF-8 text; compressed and binary files are not read"
RIGHTS = "check the rights of the file, and the disk"

COLUMN = "text"
# Never a data set's name: without these a mistyped file name would be asked for on a hub.
OTHER_SUFFIXES = (".json", ".csv", ".tsv", ".md", ".gz", ".xz", ".zip", ".zst", ".arrow")
# A line of text is a paragraph at most; longer ones are binary files or dumps that would fill the memory.
LINE_BYTES = 16 * 2**20
# Tokenised in one go: published test texts (wikitext-2 has 1.3 M characters) fit whole, so that no seam
# changes their tokens, and the tokenizer's own bookkeeping stays under some 200 MB.
PIECE_CHARACTERS = 4 * 2**20
PARQUET_ROWS = 1024
# What a hub token looks like; error texts of the libraries below may quote the request that failed.
SECRET = re.compile(r"hf_\w+|Bearer\s+\S+")


def texts(text: TextSource) -> Iterator[str]:
    """Yield the documents of a source, in order, without holding it in memory.

    Yields:
        A row's text as it stands, also an empty one. Plain text is one document, which comes in pieces of
        about 4 million characters, cut after a line's end.

    Raises:
        InputError: The source is missing, damaged or not text, or its column is not there.
        EnvironmentFailure: The source cannot be reached, or may not be read.
    """
    column = text.column or COLUMN
    if text.source == DEMO:
        yield from _demo()
    elif _is_file(text.source):
        path = data_file(text.source)
        if path.suffix == ".txt":
            yield from _join(_lines(path), "")
        else:
            yield from (_jsonl if path.suffix == ".jsonl" else _parquet)(path, column)
    else:
        yield from _dataset(text.source, column, text.split, text.revision)


def check_text(text: TextSource) -> None:
    """Check that a source is there and begins with text; errors are those of `texts`."""
    for _ in texts(text):
        return
    raise InputError(f"{text.source}: no text in it", hint="it has no rows or lines")


def pieces(text: TextSource) -> Iterator[str]:
    """Yield a source as one running text, in pieces that are long enough to be tokenised one by one.

    Documents are joined by a blank line, empty ones too, as the published perplexities of wikitext join its
    rows. Errors are those of `texts`.

    Raises:
        InputError: There is no text at all, or one of `texts`.
    """
    documents = texts(text)
    plain = text.source == DEMO or text.source.endswith(".txt")
    empty = True
    for piece in documents if plain else _join(documents, "\n\n"):
        empty = empty and not piece.strip()
        yield piece
    if empty:
        raise InputError(f"{text.source}: no text in it", hint="every row or line is empty")


def name_of(source: str) -> str:
    """Return the short name of a source: a file's stem, or a data set's configuration, else its last part."""
    return Path(source).stem if _is_file(source) else source.rsplit("/", 1)[-1].rsplit(":", 1)[-1]


def data_failure(error: Exception, what: str) -> StructpruneError:
    """Turn an error met while fetching `what` from a hub into one line that carries no credentials.

    Returns:
        InputError when the data is there but is not what was asked for, else EnvironmentFailure.
    """
    reason = SECRET.sub("***", str(error).strip().split("\n", 1)[0])
    message = f"{what}: {reason or type(error).__name__}"
    # `datasets` repeats some answers in words of its own, without their cause.
    if re.search(r"\b(401|403|gated)\b", reason):
        return EnvironmentFailure(message, hint="accept its terms, then log in with `hf auth login`")
    if re.search(r"\b429\b", reason):
        return EnvironmentFailure(message, hint="the hub asks to wait; try again later, or log in")
    if hub.is_answer(error):
        return EnvironmentFailure(message, hint=hub.hub_failure(error, what).hint)
    return InputError(message, hint="check the name, the configuration, the split and the revision")


def _is_file(source: str) -> bool:
    return (
        source.endswith(SUFFIXES + OTHER_SUFFIXES)
        or source.startswith(("/", ".", "~"))
        or Path(source).exists()
    )


def data_file(source: str) -> Path:
    """Return the file that a source names.

    Raises:
        InputError: It is missing, no regular file, or of a kind that is not read.
        EnvironmentFailure: It may not be looked at.
    """
    path = Path(source).expanduser()
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file", hint="check the path; relative ones start at the working directory"
        ) from None
    except OSError as error:
        raise EnvironmentFailure(f"{path}: {error.strerror}", hint=RIGHTS) from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: not a regular file", hint=PLAIN_FILE)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: unknown kind of data file", hint=f"known are {', '.join(SUFFIXES)}")
    return path


def _demo() -> Iterator[str]:
    with as_file(files("structprune") / "demo" / "calibration.txt") as path:
        yield from _join(_lines(path), "")


def _join(parts: Iterable[str], glue: str) -> Iterator[str]:
    """Yield the parts joined by `glue`, cut between two of them once a piece is long enough."""
    held: list[str] = []
    size = 0
    for part in parts:
        if size >= PIECE_CHARACTERS:
            yield glue.join(held) + glue
            held, size = [], 0
        held.append(part)
        size += len(part)
    if held:
        yield glue.join(held)


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends; at most one line is in memory."""
    try:
        with path.open("rb") as file:
            offset, number = 0, 0
            while line := file.readline(LINE_BYTES + 1):
                number += 1
                if len(line) > LINE_BYTES:
                    raise InputError(
                        f"{path}: line {number}, at byte {offset}, is longer than {LINE_BYTES} bytes",
                        hint="break it into lines, or use .jsonl with one document per line",
                    )
                yield _decode(line, path, number, offset)
                offset += len(line)
    except OSError as error:
        raise EnvironmentFailure(f"{path}: {error.strerror}", hint=RIGHTS) from None


def _decode(line: bytes, path: Path, number: int, offset: int) -> str:
    skipped = len(codecs.BOM_UTF8) if offset == 0 and line.startswith(codecs.BOM_UTF8) else 0
    try:
        text = line[skipped:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + skipped + error.start
        bad = error.object[error.start]
        raise InputError(
            f"{path}: not UTF-8 at byte {at} (line {number}): 0x{bad:02x} cannot stand there",
            hint=AS_TEXT,
        ) from None
    if "\0" in text:
        at = offset + line.index(b"\0")
        raise InputError(
            f"{path}: a NUL byte at byte {at} (line {number}); this is a binary file, not text", hint=AS_TEXT
        )
    return text


def _jsonl(path: Path, column: str) -> Iterator[str]:
    for number, row in jsonl_rows(path, f'{{"{column}": "some text"}}'):
        yield _cell(row, column, f"{path}: line {number}")


def jsonl_rows(path: Path, example: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a file of JSON lines, each with the number of its line; empty lines are none.

    Args:
        path: The file.
        example: A line as it could be, for errors.
    """
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}: line {number} is not JSON: {error}",
                hint="one JSON object a line; a plain text is called .txt",
            ) from None
        if not isinstance(row, dict):
            found = type(row).__name__
            raise InputError(
                f"{path}: line {number} holds a {found}, expected an object",
                hint=f"one object a line, such as {example}",
            )
        yield number, row


def _cell(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise _no_column(where, column, row)
    value = row[column]
    if not isinstance(value, str):
        raise InputError(
            f"{where}: column {column!r} holds {value!r:.40}, expected text",
            hint="choose a column of texts with `column`",
        )
    return value


def _no_column(where: str, column: str, seen: Iterable[str]) -> InputError:
    listed = ", ".join(sorted(seen)) or "none"
    return InputError(f"{where}: no column {column!r}; columns are: {listed}", hint="name one with `column`")


def _parquet(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise _missing_extra(str(error.name), "reading .parquet files") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise _no_column(str(path), column, names)
            row = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _cell({column: value}, column, f"{path}: row {row}")
    except PermissionError as error:
        raise EnvironmentFailure(f"{path}: {error.strerror}", hint=RIGHTS) from None
    except (pyarrow.ArrowException, OSError) as error:
        said = str(error).partition("\n")[0]
        raise InputError(
            f"{path}: not a readable parquet file: {said}",
            hint="the file is damaged or of another kind: write it again, or use .txt or .jsonl",
        ) from None


def _dataset(source: str, column: str, split: str, revision: str | None) -> Iterator[str]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise _missing_extra(str(error.name), f"the data set {source!r}") from None

    # The hub's HTTP library changes its name between releases; its base error is found where the hub imports
    # it.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    name, _, config = source.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UsageError(
            f"{source!r} is neither a file nor the name of a data set", hint="name:config, or a path"
        )
    # Read as a stream, because a web corpus would first be downloaded whole; offline only the cache is left,
    # which the streaming reader of `datasets` does not look at.
    streaming = not datasets.config.HF_HUB_OFFLINE
    try:
        rows = datasets.load_dataset(
            name, config or None, split=split, revision=revision, streaming=streaming
        )
        for number, row in enumerate(rows, start=1):
            yield _cell(row, column, f"{source}, split {split!r}: row {number}")
    except (OSError, ValueError, RuntimeError, HTTPError, datasets.exceptions.DatasetsError) as error:
        # RuntimeError is how `datasets` refuses data sets that come with a script.
        raise data_failure(error, f"data set {source!r}") from None


def _missing_extra(module: str, purpose: str) -> EnvironmentFailure:
    return EnvironmentFailure(f"{purpose} needs {module}", hint="pip install 'structprune[data]'")
