"""Bad data: each case is refused with one line that says where and why, and with the exit code that fits."""

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from structprune.calibration import texts as texts_module
from structprune.calibration.data import load
from structprune.calibration.text_source import TextSource
from structprune.calibration.texts import data_failure, texts
from structprune.errors import EnvironmentFailure, InputError, StructpruneError, UsageError
from structprune.models.tokenizer import check_vocabulary, open_tokenizer
from tests.tiny import VOCABULARY, tiny, tokenizer

Write = Callable[[str, bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content)
        return str(path)

    return write


def refused(source: str, kind: type[StructpruneError] = InputError, **options: str) -> str:
    """Return the one line with which reading a source is refused."""
    with pytest.raises(kind) as caught:
        list(texts_module.pieces(TextSource(source, **options)))
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_tokenizer_larger_than_the_embeddings_is_refused_with_both_numbers() -> None:
    large = tokenizer()
    large.add_tokens([f"<extra{number}>" for number in range(VOCABULARY)])
    with pytest.raises(InputError, match=rf"ids up to {len(large) - 1}, .*embeddings for {VOCABULARY} ids"):
        check_vocabulary(large, tiny("llama"))
    check_vocabulary(tokenizer(), tiny("llama"))


def test_a_folder_without_a_tokenizer_is_refused_where_one_is_needed(tmp_path: Path) -> None:
    assert open_tokenizer(tmp_path) is None
    with pytest.raises(InputError, match="no tokenizer in the model folder"):
        check_vocabulary(None, tiny("llama"))


def test_too_few_tokens_are_counted_and_what_fits_is_offered(write: Write) -> None:
    source = write("short.txt", b"x" * 100)
    with pytest.raises(InputError) as caught:
        load(TextSource(source), tokenizer(), samples=4, length=64)
    assert "has 100 tokens" in str(caught.value)
    assert "4 samples of length 64 need 256" in str(caught.value)
    assert "1 samples of length 64, or 4 samples of length 25" in str(caught.value)
    assert load(TextSource(source), tokenizer(), samples=1, length=64).facts["tokens_available"] == 100
    assert load(TextSource(source), tokenizer(), samples=4, length=25).facts["samples"] == 4


def test_a_text_for_which_nothing_fits_is_refused_with_its_count(write: Write) -> None:
    with pytest.raises(InputError, match=r"has 1 tokens.*use a longer text"):
        load(TextSource(write("short.txt", b"x")), tokenizer(), samples=4, length=64)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b""), ("a.txt", b"\n  \n"), ("a.jsonl", b""), ("a.jsonl", b'{"text": ""}\n{"text": " "}\n')],
)
def test_an_empty_source_is_refused(write: Write, name: str, content: bytes) -> None:
    assert "no text in it" in refused(write(name, content))


def test_a_wrong_column_lists_the_columns_seen(write: Write, tmp_path: Path) -> None:
    line = refused(write("pages.jsonl", b'{"page": "one", "id": 1}\n'))
    assert "line 1" in line
    assert "no column 'text'; columns are: id, page" in line
    path = tmp_path / "pages.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"page": ["one"], "id": [1]}), path)
    assert "no column 'text'; columns are: id, page" in refused(str(path))


def test_a_column_that_is_not_text_names_the_row(write: Write, tmp_path: Path) -> None:
    line = refused(write("pages.jsonl", b'{"text": "one"}\n{"text": null}\n'))
    assert "line 2: column 'text' holds None, expected text" in line
    path = tmp_path / "pages.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [7]}), path)
    assert "row 1: column 'text' holds 7, expected text" in refused(str(path))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"text": "one"}\n{"text": \n', "line 2 is not JSON"),
        (b'["one"]\n', "line 1 holds a list"),
        (b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_a_damaged_line_of_jsonl_is_named(write: Write, content: bytes, told: str) -> None:
    assert told in refused(write("pages.jsonl", content))


def test_a_file_that_is_not_parquet_is_refused(write: Write) -> None:
    assert "not a readable parquet file" in refused(write("pages.parquet", b"PAR1 but not really"))


def test_a_length_over_what_the_model_knows_is_refused(write: Write) -> None:
    with pytest.raises(UsageError, match=r"length 256 is more than .*max_position_embeddings, 128"):
        load(TextSource(write("a.txt", b"x" * 1000)), tokenizer(), samples=1, length=256, max_length=128)


GOOD = b'{"text": ""}\n'  # 13 bytes, good as a line of either kind


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (GOOD + b"bad \xff line\n", "not UTF-8 at byte 17 (line 2): 0xff"),
        (b"\xff\xfeh\x00i\x00", "not UTF-8 at byte 0 (line 1)"),
        (b"\xef\xbb\xbfcaf\xe9\n", "not UTF-8 at byte 6 (line 1): 0xe9"),
        (b"cut in a character \xc3", "not UTF-8 at byte 19"),
        (GOOD + b"binary \x00 line\n", "a NUL byte at byte 20 (line 2)"),
        (b"\x1f\x8b\x08 compressed", "not UTF-8 at byte 1"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_what_is_not_text_is_refused_with_its_byte(
    write: Write, name: str, content: bytes, told: str
) -> None:
    assert told in refused(write(name, content))


def test_an_endless_line_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "endless.txt"
    with path.open("wb") as file:
        file.write(b"first line\n")
        # Sparse: five billion characters that take no room on the disk.
        file.truncate(5 * 10**9)
    tracemalloc.start()
    try:
        line = refused(str(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "line 2, at byte 11, is longer than 16777216 bytes" in line
    assert peak < 64 * 2**20


def test_a_missing_file_is_not_looked_for_on_a_hub() -> None:
    assert "no such file" in refused("nowhere/corpus.txt")
    assert "no such file" in refused("./corpus")


def test_a_file_of_an_unknown_kind_lists_the_known_ones(write: Write) -> None:
    assert ".txt, .jsonl, .parquet" in refused(write("corpus.csv", b"a,b\n"))


def test_a_pipe_or_a_folder_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    assert "not a regular file" in refused(str(pipe))
    assert "not a regular file" in refused(str(tmp_path))


def test_a_source_that_is_neither_a_file_nor_a_name_is_refused() -> None:
    assert "neither a file nor the name of a data set" in refused("two words", UsageError)


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach 'group/pages' on the Hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    line = refused("group/pages", EnvironmentFailure)
    assert "Couldn't reach 'group/pages'" in line
    assert "local files" in line


def test_an_unknown_configuration_of_a_data_set_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **options: object) -> None:
        raise ValueError("BuilderConfig 'smal' not found. Available: ['small']")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    assert "BuilderConfig 'smal' not found" in refused("group/pages:smal")


def test_a_token_never_reaches_a_message() -> None:
    for secret in ("hf_AbCdEf123", "Bearer hf_AbCdEf123"):
        failure = data_failure(ConnectionError(f"401 for {secret}"), "data set 'a/b'")
        assert isinstance(failure, EnvironmentFailure)
        assert "AbCdEf" not in str(failure)
        assert "hf auth login" in str(failure)


def test_texts_stops_at_the_first_bad_row_and_not_before(write: Write) -> None:
    rows = texts(TextSource(write("pages.jsonl", b'{"text": "one"}\nnot json\n')))
    assert next(rows) == "one"
    with pytest.raises(InputError, match="line 2"):
        next(rows)
