import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from structprune.checkpoint.side_files import copy_side_files
from structprune.errors import InputError
from structprune.storage.reader import CheckpointReader
from structprune.storage.tensor_file import save_tensors
from structprune.storage.writer import ShardWriter
from tests.checkpoints import change_header, fingerprint, tensors, write

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def rewrite(source: Path, target: Path) -> dict[str, str]:
    """Write a folder's weights again, unchanged."""
    reader = CheckpointReader(source)
    target.mkdir()
    with ShardWriter(target, reader.layout, reader.metadata, index_metadata=reader.index_metadata) as writer:
        for name in reader.tensors:
            writer.write(name, reader.read(name))
    return writer.hashes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_writing_what_was_read_gives_the_bytes_of_the_source(tmp_path: Path, dtype, shards) -> None:
    source = write(tmp_path / "source", tensors(dtype), shards=shards)
    hashes = rewrite(source, tmp_path / "target")
    written = fingerprint(tmp_path / "target")
    assert hashes == written
    assert written == {
        name: digest for name, digest in fingerprint(source).items() if name not in (INDEX, "config.json")
    } | {name: digest for name, digest in written.items() if name == INDEX}


def test_the_index_is_that_of_the_source(tmp_path: Path) -> None:
    source = write(tmp_path / "source", shards=3)
    rewrite(source, tmp_path / "target")
    index = json.loads((tmp_path / "target" / INDEX).read_text())
    assert index == json.loads((source / INDEX).read_text())
    assert list(index["weight_map"]) == sorted(index["weight_map"])


def test_a_single_file_without_an_index_stays_without_one(tmp_path: Path) -> None:
    rewrite(write(tmp_path / "source"), tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").iterdir()] == [FILE]


def test_new_shards_count_bytes_and_parameters_in_their_index(tmp_path: Path) -> None:
    layout = {"a.safetensors": [("x", torch.float32, (2, 3))], "b.safetensors": [("y", torch.bfloat16, (4,))]}
    with ShardWriter(tmp_path, layout, {}) as writer:
        writer.write("y", torch.ones(4, dtype=torch.bfloat16))
        writer.write("x", torch.ones(2, 3))
    index = json.loads((tmp_path / INDEX).read_text())
    assert index == {
        "metadata": {"total_parameters": 10, "total_size": 32},
        "weight_map": {"x": "a.safetensors", "y": "b.safetensors"},
    }


def test_notes_and_order_of_a_file_are_kept(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    change_header(source / FILE, lambda header: header["__metadata__"].update(zebra="1", apple="2"))
    order = list(CheckpointReader(source).tensors)
    rewrite(source, tmp_path / "target")
    (tmp_path / "target" / "config.json").write_text("{}")
    reader = CheckpointReader(tmp_path / "target")
    assert list(reader.tensors) == order
    assert list(reader.metadata[FILE].items()) == [("format", "pt"), ("zebra", "1"), ("apple", "2")]


def test_the_library_reads_what_is_written_and_would_write_the_same(tmp_path: Path) -> None:
    content = {"one": torch.arange(6.0).reshape(2, 3), "two": torch.tensor(1.0), "zwölf": torch.empty(0, 2)}
    save_tensors(tmp_path / "ours", content, {"format": "pt"})
    save_file(content, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert all(torch.equal(load_file(tmp_path / "ours")[name], tensor) for name, tensor in content.items())


def test_a_tensor_that_the_layout_does_not_expect_stops_the_writer(tmp_path: Path) -> None:
    layout = {FILE: [("a", torch.float32, (2,)), ("b", torch.float32, (2,))]}
    for name, tensor in (("b", torch.ones(2)), ("a", torch.ones(3)), ("a", torch.ones(2).half())):
        with pytest.raises(ValueError, match="expected"), ShardWriter(tmp_path, layout, {}) as writer:
            writer.write(name, tensor)
    with pytest.raises(ValueError, match="2 tensors not written"), ShardWriter(tmp_path, layout, {}):
        pass
    with pytest.raises(ValueError, match="came twice"), ShardWriter(tmp_path, layout, {}) as writer:
        writer.write("a", torch.ones(2))
        writer.write("b", torch.ones(2))
        writer.write("b", torch.ones(2))


def test_an_exception_leaves_no_unfinished_file(tmp_path: Path) -> None:
    layout = {FILE: [("a", torch.float32, (2,)), ("b", torch.float32, (2,))]}
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, layout, {}) as writer:
        writer.write("a", torch.ones(2))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    layout = {FILE: [("a", torch.float32, (2,)), ("b", torch.float32, (2,))]}
    with ShardWriter(tmp_path, layout, {}) as writer:
        writer.write("a", torch.ones(2))
        assert not (tmp_path / FILE).exists()
        writer.write("b", torch.ones(2))
        assert (tmp_path / FILE).exists()
        assert writer.hashes[FILE] == hashlib.sha256((tmp_path / FILE).read_bytes()).hexdigest()


def test_side_files_are_copied_byte_for_byte_and_weights_are_not(tmp_path: Path) -> None:
    kept = {
        *(
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
        ),
        *("chat_template.jinja", "merges.txt", "vocab.json", "preprocessor_config.json", "LICENSE"),
        *("NOTICE.txt", "modeling_own.py", "additional_chat_templates/tool.jinja"),
    }
    left = {
        *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "x.gguf", "optimizer.pt"),
        *("pytorch_model.bin.index.json", "README.md", ".gitattributes", "structprune.json"),
        *("structprune/recipe.yaml", "picture.png", "original/params.json"),
    }
    source, target = tmp_path / "source", tmp_path / "target"
    for name in kept | left:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(name.encode() * (300_000 if name == "tokenizer.json" else 1))
    target.mkdir()
    hashes = copy_side_files(source, target)
    assert hashes.keys() == kept
    for name in kept:
        assert (target / name).read_bytes() == (source / name).read_bytes()
        assert hashes[name] == hashlib.sha256((source / name).read_bytes()).hexdigest()


def test_a_side_file_may_not_be_a_link_to_somewhere_else(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"tokenizer\.json: the link leads out"):
        copy_side_files(source, target)
    assert copy_side_files(source, target, allow_external_symlinks=True).keys() == {"tokenizer.json"}
    assert not (target / "tokenizer.json").is_symlink()
