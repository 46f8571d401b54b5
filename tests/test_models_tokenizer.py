"""Opening tokenizers, and telling those that do not fit the model."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from structprune.errors import InputError
from structprune.models.opening import Opening
from structprune.models.shipped import SHIPPED_CLASSES, SHIPPED_TYPE
from structprune.models.streamed import open_model
from structprune.models.tokenizer import check_vocabulary, open_tokenizer
from tests.tiny import VOCABULARY, save_tiny, tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "llama")


def test_the_tokenizer_of_the_folder_is_opened(folder: Path) -> None:
    opened = open_tokenizer(folder)
    assert opened is not None
    text = "Hello wörld, the 日本 cat\n"
    assert opened(text)["input_ids"] == tokenizer()(text)["input_ids"]
    check_vocabulary(opened, open_model(folder))
    check_vocabulary(opened, open_model(folder, Opening(stream=True)))


def test_a_folder_without_a_tokenizer_is_told_apart_from_a_damaged_one(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer cannot be opened"):
        open_tokenizer(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert open_tokenizer(folder) is None
    with pytest.raises(InputError, match="there is no tokenizer"):
        check_vocabulary(None, open_model(folder, Opening(stream=True)))


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused_with_both_numbers(folder: Path) -> None:
    large: PreTrainedTokenizerFast = tokenizer()
    large.add_tokens([f"<extra {number}>" for number in range(VOCABULARY - len(large))])
    check_vocabulary(large, open_model(folder, Opening(stream=True)))
    large.add_tokens(["<one too many>"])
    with pytest.raises(InputError, match=rf"ids up to {VOCABULARY}, .* for {VOCABULARY} ids"):
        check_vocabulary(large, open_model(folder, Opening(stream=True)))


def test_a_tokenizer_with_its_own_code_is_refused_unless_trusted(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (folder / "tok.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()")
    file = folder / "tokenizer_config.json"
    custom = {"auto_map": {"AutoTokenizer": ["tok.Custom", None]}, "tokenizer_class": "Custom"}
    file.write_text(json.dumps(json.loads(file.read_text()) | custom))
    with pytest.raises(InputError, match="--trust-remote-code"):
        open_tokenizer(folder)
    assert not marker.exists()


def test_a_modelling_file_of_ours_is_neither_run_nor_warned_of(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = json.loads((folder / "config.json").read_text())
    names = dict(zip(("AutoConfig", "AutoModelForCausalLM"), SHIPPED_CLASSES, strict=True))
    said |= {"model_type": f"{SHIPPED_TYPE}llama", "auto_map": names}
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "modeling_pruned.py").write_text("raise SystemExit(9)\n")
    for trust in (False, True):
        opened = open_tokenizer(folder, Opening(trust_remote_code=trust))
        assert opened is not None
        assert opened("a cat")["input_ids"] == tokenizer()("a cat")["input_ids"]
    assert "to instantiate a model of type" not in capfd.readouterr().err
