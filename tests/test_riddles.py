"""What other libraries answer with a traceback, or not at all, ends in one line that names file and key."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import structprune
from structprune.errors import EnvironmentFailure, InputError, UsageError
from structprune.plan.plan import Plan
from structprune.storage.hub import hub_failure
from structprune.storage.scratch import scratch_folder
from tests.tiny import save_tiny, tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = save_tiny("llama", tmp_path / "llama")
    tokenizer().save_pretrained(made)
    return made


def change(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10_000_000),
        ("hidden_size", 2**30),
        ("vocab_size", 2**30),
        ("vocab_size", "\n"),
        ("pad_token_id", 2**32),
        ("dtype", [None]),
        ("num_attention_heads", "64"),
    ],
)
def test_a_size_that_the_files_do_not_hold_is_named_at_once(key: str, value: object, folder: Path) -> None:
    change(folder / "config.json", **{key: value})
    began = time.monotonic()
    with pytest.raises(InputError, match=rf"config\.json: {key} is ") as refused:
        structprune.inspect(str(folder))
    assert "\n" not in str(refused.value)
    # Far below what building ten million blocks takes, far above what a busy machine takes to refuse them.
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "content", ["{", '{"version": "1.0"}', '{"a":' * 5000, "[]", '{"model": {"type": "nosuch"}}']
)
def test_a_damaged_tokenizer_is_named(content: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="tokenizer"):
        structprune.inspect(str(folder))


@pytest.mark.parametrize("value", [[1], "a" * 5000, True, {}])
def test_a_setting_of_the_tokenizer_of_another_type_is_named(value: object, folder: Path) -> None:
    change(folder / "tokenizer_config.json", model_max_length=value)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: model_max_length is"):
        structprune.inspect(str(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("config", value) for value in (-1, None, True, "64", [1])),
        *(("blocks", value) for value in (-1, "2", None)),
        *(("method", 1), ("facts", []), ("patch", "x"), ("id", None)),
    ],
)
def test_a_key_of_a_plan_of_another_type_is_named(key: str, value: object, tmp_path: Path) -> None:
    head = {"format": 2, "method": "wanda", "config": {}, "architecture": "a", "weights": "w"}
    head |= {"facts": {}, "promises": None, "patch": {}, "blocks": 0, "id": "i"}
    (tmp_path / "plan.json").write_text(json.dumps(head | {key: value}))
    with pytest.raises(InputError, match=rf"plan\.json: {key}: "):
        Plan.load(tmp_path)


@pytest.mark.parametrize("call", [structprune.prune, structprune.recover, structprune.apply])
def test_a_model_in_memory_is_told_what_is_taken(call, tmp_path: Path) -> None:
    for model in (nn.Linear(2, 2), None, 3):
        with pytest.raises(UsageError, match="found an object of type"):
            call(model, tmp_path / "out", *(["magnitude"] if call is structprune.prune else []))


def test_a_message_is_one_line_whatever_it_quotes() -> None:
    assert str(InputError("a\nb\r\nc", hint="d")) == "a b c (d)"


def test_a_temporary_folder_that_cannot_be_made_names_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    monkeypatch.setattr("tempfile.tempdir", str(gone))
    with pytest.raises(EnvironmentFailure, match=str(gone)) as refused:
        scratch_folder("test")
    assert "TMPDIR" in refused.value.hint


def test_what_caused_an_answer_of_the_hub_is_told_and_no_token() -> None:
    class Response:
        status_code = 429

    asked_too_often = OSError("hf_SECRET")
    asked_too_often.response = Response()
    wrapped = FileNotFoundError("hf_SECRET")
    wrapped.__cause__ = asked_too_often
    failure = hub_failure(wrapped, "owner/name")
    assert "429" in failure.message and "SECRET" not in str(failure)


def test_the_model_that_is_refused_is_the_one_that_opens(folder: Path) -> None:
    assert structprune.inspect(str(folder))["blocks"] == 2
    assert torch.isfinite(next(iter(structprune.load(folder)[0].parameters()))).all()
