"""Calibration data: which text is read, which windows are drawn, and what is said when that cannot be."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from structprune.calibration import texts as texts_module
from structprune.calibration.data import cut, encode, load, sequence_start, window_length
from structprune.calibration.text_source import TextSource
from structprune.calibration.texts import name_of, pieces, texts
from structprune.errors import UsageError
from tests.tiny import tokenizer

# Every line holds a square, so that no two windows are alike.
PROSE = "".join(f"Line {number} of a text, {number**2} squared.\n" for number in range(1000, 1300))


@pytest.fixture
def prose(tmp_path: Path) -> str:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    return str(path)


def with_bos() -> PreTrainedTokenizerFast:
    ours = tokenizer()
    ours.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ours.bos_token_id)]
    )
    return ours


def test_plain_text_is_read_as_it_stands(prose: str) -> None:
    assert list(texts(TextSource(prose))) == [PROSE]


def test_plain_text_comes_in_pieces_cut_after_a_line(prose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts_module, "PIECE_CHARACTERS", 1000)
    parts = list(texts(TextSource(prose)))
    assert "".join(parts) == PROSE
    assert len(parts) > 5
    assert all(part.endswith("\n") and len(part) < 1100 for part in parts)


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "marked.txt"
    path.write_bytes(b"\xef\xbb\xbfH\xc3\xa9llo\n")
    assert list(texts(TextSource(str(path)))) == ["Héllo\n"]


def test_jsonl_yields_one_document_per_line(tmp_path: Path) -> None:
    path = tmp_path / "pages.jsonl"
    path.write_text('{"text": "one", "n": 1}\n\n{"text": ""}\n{"text": "two"}\n')
    assert list(texts(TextSource(str(path)))) == ["one", "", "two"]


def test_jsonl_reads_the_column_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "pages.jsonl"
    path.write_text('{"body": "one"}\n')
    assert list(texts(TextSource(str(path), column="body"))) == ["one"]


def test_parquet_yields_one_document_per_row(tmp_path: Path) -> None:
    path = tmp_path / "pages.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2]}), path)
    assert list(texts(TextSource(str(path)))) == ["one", "two"]


def test_documents_are_joined_by_a_blank_line_as_published_perplexities_join_them(tmp_path: Path) -> None:
    path = tmp_path / "pages.jsonl"
    rows = ["one", "", "two"]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert "".join(pieces(TextSource(str(path)))) == "\n\n".join(rows)


def test_pieces_of_documents_are_joined_like_the_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts_module, "PIECE_CHARACTERS", 10)
    path = tmp_path / "pages.jsonl"
    rows = [f"document {number}" for number in range(9)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    parts = list(pieces(TextSource(str(path))))
    assert len(parts) > 3
    assert "".join(parts) == "\n\n".join(rows)


def test_a_data_set_is_asked_for_with_its_configuration_split_and_revision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, object] = {}

    def load_dataset(path: str, name: str, **options: object) -> datasets.Dataset:
        asked.update(path=path, name=name, **options)
        return datasets.Dataset.from_dict({"page": ["one", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(texts(TextSource("group/pages:small", column="page", split="test", revision="abc"))) == [
        "one",
        "two",
    ]
    assert (asked["path"], asked["name"], asked["split"]) == ("group/pages", "small", "test")
    assert asked["revision"] == "abc"


def test_a_text_is_named_by_its_stem_and_a_data_set_by_its_configuration() -> None:
    assert name_of("some/where/wiki.test.txt") == "wiki.test"
    assert name_of("Salesforce/wikitext:wikitext-2-raw-v1") == "wikitext-2-raw-v1"
    assert name_of("group/pages") == "pages"
    assert name_of("demo") == "demo"


def test_windows_follow_each_other_without_overlap_and_the_rest_is_dropped() -> None:
    assert cut(torch.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert cut(torch.arange(7), 3, 2).tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert cut(torch.arange(2), 3).shape == (0, 3)


def test_every_sample_is_a_window_of_the_text_and_none_is_drawn_twice(prose: str) -> None:
    ours = tokenizer()
    stream = encode([PROSE], ours)
    windows = {tuple(window) for window in cut(stream, 16).tolist()}
    data = load(TextSource(prose), ours, samples=20, length=16, batch_size=8)
    drawn = [tuple(row) for batch in data.batches for row in batch["input_ids"].tolist()]
    assert [len(batch["input_ids"]) for batch in data.batches] == [8, 8, 4]
    assert len(drawn) == len(set(drawn)) == 20
    assert set(drawn) <= windows
    assert data.batches[0]["input_ids"].dtype == torch.int64
    assert list(data.batches[0]) == ["input_ids"]


def test_the_seed_decides_what_is_drawn(prose: str) -> None:
    one, again, other = (
        load(TextSource(prose), tokenizer(), samples=8, length=16, seed=seed).facts["sha256"]
        for seed in (0, 0, 1)
    )
    assert one == again != other


def test_the_batch_size_changes_no_sample(prose: str) -> None:
    one, other = (
        load(TextSource(prose), tokenizer(), samples=9, length=16, batch_size=size).facts["sha256"]
        for size in (2, 9)
    )
    assert one == other


def test_the_facts_say_what_was_read(prose: str) -> None:
    facts = load(TextSource(prose), tokenizer(), samples=4, length=16, seed=3).facts
    available = encode([PROSE], tokenizer()).numel()
    assert available > 4 * 16 * 16
    assert facts["tokens_available"] == 4 * 16 * 16  # reading stops at 16 times what is needed
    assert (facts["source"], facts["seed"], facts["samples"], facts["length"]) == (prose, 3, 4, 16)
    assert json.loads(json.dumps(facts)) == facts


def test_a_window_begins_as_the_tokenizer_begins_a_text(prose: str) -> None:
    assert sequence_start(tokenizer()).rule == "none"
    ours = with_bos()
    data = load(TextSource(prose), ours, samples=4, length=16)
    ids = data.batches[0]["input_ids"]
    assert data.facts["bos"] == "window"
    assert ids.shape == (4, 16)
    assert (ids[:, 0] == ours.bos_token_id).all()
    assert (ids[:, 1:] != ours.bos_token_id).all()


def test_the_length_defaults_to_what_the_model_knows_but_never_over_2048() -> None:
    assert window_length(None, 128) == 128
    assert window_length(None, 131072) == 2048
    assert window_length(None, None) == 2048
    assert window_length(4096, 8192) == 4096


@pytest.mark.parametrize("options", [{"samples": 0}, {"batch_size": 0}, {"length": 1}])
def test_counts_must_make_sense(prose: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected at least"):
        load(TextSource(prose), tokenizer(), **({"samples": 2, "length": 16} | options))
