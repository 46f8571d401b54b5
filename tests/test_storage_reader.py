import hashlib
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from structprune.errors import InputError
from structprune.models import agreement
from structprune.storage.header import read_header
from structprune.storage.reader import CheckpointReader
from structprune.storage.safe_open import read_at
from structprune.storage.scan import combine
from structprune.storage.strict_json import parse_json
from structprune.storage.tensor_file import read_tensors, save_tensors
from tests.checkpoints import open_strictly, shapes, tensors, write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_sound_folder_reads_back_bit_for_bit(tmp_path: Path, dtype, shards) -> None:
    content = tensors(dtype)
    found = open_strictly(write(tmp_path, content, shards=shards))
    assert found.keys() == content.keys()
    for name, tensor in content.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


def test_the_reader_tells_what_the_writer_needs(tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path, shards=2))
    assert reader.indexed
    assert reader.index_metadata == {"total_size": reader.nbytes}
    assert list(reader.shards) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert reader.metadata["model-00001-of-00002.safetensors"] == {"format": "pt"}
    assert reader.shapes == shapes()
    assert [entry[0] for entries in reader.layout.values() for entry in entries] == list(reader.tensors)


def test_every_dtype_and_empty_and_scalar_tensors_survive_a_small_file(tmp_path: Path) -> None:
    content = {
        "mask": torch.tensor([True, False, True]),
        "packed": torch.arange(5, dtype=torch.uint8),
        "index": torch.tensor([2**40, -1]),
        "half": torch.tensor([1.5, float("-inf")], dtype=torch.bfloat16),
        "eighth": torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }
    digest = save_tensors(tmp_path / "plan.safetensors", content, {"b": "2", "a": "1"})
    assert digest == hashlib.sha256((tmp_path / "plan.safetensors").read_bytes()).hexdigest()
    found = read_tensors(tmp_path / "plan.safetensors")
    assert found.keys() == content.keys()
    for name, tensor in content.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].double(), tensor.double())
    assert read_header(tmp_path / "plan.safetensors").metadata == {"a": "1", "b": "2"}


def test_the_hash_of_the_weights_does_not_depend_on_the_sharding(tmp_path: Path) -> None:
    one = CheckpointReader(write(tmp_path / "one")).scan()
    three = CheckpointReader(write(tmp_path / "three", shards=3)).scan()
    assert one.weights == three.weights
    assert list(one.tensors) == sorted(shapes())
    other = tensors()
    other["model.norm.weight"][0] += 1
    assert CheckpointReader(write(tmp_path / "other", other)).scan().weights != one.weights


def test_the_hash_of_the_weights_is_made_of_the_hashes_of_the_tensors(tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path))
    names = sorted(reader.tensors)
    digests = [hashlib.sha256(reader.read(name).numpy().tobytes()).hexdigest() for name in names]
    assert reader.scan().weights == combine(
        {
            (name, reader.tensors[name].dtype, reader.tensors[name].shape): digest
            for name, digest in zip(names, digests, strict=True)
        }
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_of_both_signs_are_counted(tmp_path: Path, dtype) -> None:
    content = tensors(dtype)
    content["lm_head.weight"].view(-1)[:5] = torch.tensor([0.0, -0.0, 0.0, 1e-3, -1e-3], dtype=dtype)
    zeros = CheckpointReader(write(tmp_path, content)).scan().zeros
    assert zeros["lm_head.weight"] == 3
    assert sum(zeros.values()) == 3


def test_a_tensor_of_several_chunks_is_scanned_to_its_end(tmp_path: Path) -> None:
    large = torch.ones(1 << 19, 2, dtype=torch.bfloat16)
    large[-1, -1] = 0
    write(tmp_path, {"large.weight": large})
    assert CheckpointReader(tmp_path).scan().zeros == {"large.weight": 1}
    large[-1, -1] = float("nan")
    write(tmp_path, {"large.weight": large})
    with pytest.raises(InputError, match=r"'large\.weight' holds 1 NaN and 0 infinite"):
        CheckpointReader(tmp_path).scan()


def test_a_mask_that_the_model_ignores_may_be_infinite(tmp_path: Path) -> None:
    mask = torch.full((1, 4), float("-inf"))
    reader = CheckpointReader(write(tmp_path, tensors() | {"h.0.attn.mask": mask}))
    assert reader.scan(lambda name: name.endswith(".mask")).tensors["h.0.attn.mask"].infinities == 4
    with pytest.raises(InputError, match=r"'h\.0\.attn\.mask' holds 0 NaN and 4 infinite"):
        reader.scan()


def test_integers_and_flags_are_scanned_too(tmp_path: Path) -> None:
    content = {"a.position_ids": torch.arange(4), "b.mask": torch.tensor([[True, False]])}
    scan = CheckpointReader(write(tmp_path, content)).scan()
    assert scan.zeros == {"a.position_ids": 1, "b.mask": 1}
    assert scan.constant == ()


def test_a_file_that_changes_after_the_check_is_noticed(tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path))
    save_file(tensors(seed=1), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: the file was changed while it was being read"):
        reader.read("lm_head.weight")
    with pytest.raises(InputError, match="was changed"):
        reader.scan()


def test_short_reads_are_completed_and_an_early_end_is_named(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(10)))
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:3]], offset))
    with path.open("rb") as file:
        buffer = bytearray(8)
        read_at(file.fileno(), memoryview(buffer), 2, path)
        assert buffer == bytes(range(2, 10))
        with pytest.raises(InputError, match="ends at byte 10, expected 4 more bytes"):
            read_at(file.fileno(), memoryview(buffer), 6, path)


def test_a_boolean_is_zero_or_one(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"mask": torch.tensor([True, False])})
    raw = bytearray((tmp_path / "x.safetensors").read_bytes())
    raw[-1] = 7
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(InputError, match="'mask' is boolean but holds the byte 7"):
        read_tensors(tmp_path / "x.safetensors")


def test_a_hugging_face_cache_made_of_links_is_read(tmp_path: Path) -> None:
    blobs = tmp_path / "models--maker--name" / "blobs"
    snapshot = tmp_path / "models--maker--name" / "snapshots" / "0123abcd"
    write(blobs)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert open_strictly(snapshot).keys() == shapes().keys()


def test_external_links_are_read_when_they_are_allowed(tmp_path: Path) -> None:
    write(tmp_path / "real")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).symlink_to(tmp_path / "real" / name)
    with pytest.raises(InputError, match="leads out of the model folder"):
        CheckpointReader(tmp_path / "model")
    assert CheckpointReader(tmp_path / "model", allow_external_symlinks=True).shapes == shapes()


def test_what_the_class_ignores_is_no_extra_tensor(tmp_path: Path) -> None:
    content = tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    assert len(open_strictly(write(tmp_path, content))) == len(shapes()) + 1


def test_old_harmless_private_keys_go_without_a_warning(tmp_path: Path, caplog) -> None:
    write(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"_name_or_path": "x/y"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with caplog.at_level(logging.WARNING):
        assert "_name_or_path" not in CheckpointReader(tmp_path).config
    assert not caplog.records


def test_a_tied_head_may_be_stored_twice_if_both_are_equal(tmp_path: Path) -> None:
    content = tensors()
    expected = {name: shape for name, shape in shapes().items() if name != "lm_head.weight"}
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
    agreement.check(CheckpointReader(write(tmp_path, content)), expected, lambda name: False, tied)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' appears twice"),
        (b'{"a": "NaN",\n "b": NaN}', "NaN at line 2"),
        (b'{"a": -Infinity}', "-Infinity at line 1"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number cannot be read"),
        (b'{"a": "\xff"}', "not UTF-8: byte 7 is 0xff"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a": 1', "line 1 column 8"),
        (b"", "line 1 column 1"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1} x', "Extra data"),
    ],
)
def test_json_that_two_readers_could_understand_differently_is_refused(text: bytes, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_json(text, "where.json")
    assert "where.json" in str(caught.value)
    assert problem in str(caught.value)
