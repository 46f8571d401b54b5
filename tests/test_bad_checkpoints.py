"""One test per kind of damaged, hostile or unsupported model folder; the input is never touched."""

import json
import logging
import random
import tracemalloc
from pathlib import Path

import pytest
import torch

from structprune.errors import InputError, StructpruneError
from structprune.models import agreement
from structprune.models.streamed import open_model
from structprune.storage import reader
from structprune.storage.reader import CheckpointReader
from structprune.storage.writer import ShardWriter
from tests import damage
from tests.checkpoints import (
    config,
    fingerprint,
    header_of,
    open_strictly,
    shapes,
    shard_name,
    tensors,
    write,
)
from tests.damage import FILE, HEAD, INDEX, Q

BAD = [
    ("1 a shard is cut off", damage.cut_off, [shard_name(1, 3), "bytes, expected", "cut off"]),
    ("1 a file is cut off inside its header", damage.cut_inside_header, [FILE, "200 bytes"]),
    ("2 a shard is empty", damage.empty, [shard_name(2, 3), "empty", "interrupted"]),
    ("3 the header claims 2^62 bytes", damage.huge_header, [FILE, str(2**62)]),
    ("4 tensors overlap", damage.overlapping, [FILE, "overlaps"]),
    ("4 there is a hole between tensors", damage.holed, [FILE, "hole"]),
    ("4 bytes follow the last tensor", damage.trailing, [FILE, "without a meaning"]),
    ("5 a shape overflows", damage.overflowing, [FILE, Q, "larger than any memory"]),
    ("5 a shape overflows beside a zero", damage.overflowing_behind_a_zero, [FILE, "ghost.weight"]),
    ("5 a size is negative", damage.negative_size, [FILE, Q, "-8"]),
    ("6 a name is twice in a header", damage.twice_in_header, [FILE, Q, "twice"]),
    ("7 the header is longer than the limit", damage.too_long_header, [FILE, "33000000", "32000000"]),
    ("8 a dtype is unknown", damage.unknown_dtype, [FILE, Q, "'F4'", "BF16"]),
    ("9 the header is not UTF-8", damage.header_not_utf8, [FILE, "not UTF-8", "0xff"]),
    ("9 the index is not UTF-8", damage.index_not_utf8, [INDEX, "not UTF-8", "0xff"]),
    ("9 a name holds a line break", damage.private_name, [FILE, "unprintable"]),
    ("10 shards are missing", damage.two_missing_shards, [shard_name(0, 3), shard_name(2, 3), "2 of 3"]),
    ("10 the index is missing", damage.index_missing, ["3 shards", INDEX]),
    ("11 a listed tensor is absent", damage.listed_but_absent, [INDEX, "ghost.weight", shard_name(1, 3)]),
    ("11 a tensor of the model is absent", damage.missing_tensor, [Q, "missing"]),
    ("12 a tensor is not in the index", damage.not_in_index, [INDEX, Q]),
    (
        "12 a shard is not in the index",
        damage.shard_not_in_index,
        ["model-00004-of-00004.safetensors", INDEX],
    ),
    ("12 a tensor is not part of the model", damage.unexpected_tensor, ["model.surprise.weight", "not part"]),
    ("13 a tensor is in two shards", damage.in_two_shards, [HEAD, shard_name(0, 3), "two files"]),
    ("14 a key is twice in the index", damage.key_twice_in_index, [INDEX, HEAD, "twice"]),
    ("15 the index is a list", damage.index_is([]), [INDEX, "weight_map"]),
    ("15 the index is null", damage.index_is(None), [INDEX, "weight_map"]),
    ("15 weight_map is a list", damage.index_is({"weight_map": []}), [INDEX, "weight_map"]),
    ("15 a value of weight_map is a number", damage.weight_map_value(3), [INDEX, Q, "plain file name"]),
    ("16 weight_map leads up", damage.weight_map_value("../../x.safetensors"), [INDEX, Q, "plain file name"]),
    (
        "17 weight_map leads to the root",
        damage.weight_map_value("/x.safetensors"),
        [INDEX, Q, "plain file name"],
    ),
    (
        "17 weight_map leads to a drive",
        damage.weight_map_value("C:\\x.safetensors"),
        [INDEX, Q, "plain file name"],
    ),
    ("17 weight_map names a pickle", damage.weight_map_value("model.bin"), [INDEX, Q, "plain file name"]),
    ("18 a link leaves the folder", damage.link_outside, [FILE, "leads out", "--allow-external-symlinks"]),
    ("18 a link leads in a circle", damage.link_in_a_circle, [FILE, "link"]),
    ("19 a file is a pipe", damage.pipe, [FILE, "a pipe"]),
    ("19 a file is a folder", damage.folder_as_shard, [shard_name(0, 3), "a folder"]),
    ("20 pickles only", damage.only("pytorch_model.bin"), ["pytorch_model.bin", "pickle"]),
    ("20 nothing at all", damage.only(), ["no weights"]),
    ("20 weights under another name", damage.only("weights.safetensors"), ["weights.safetensors", FILE]),
    ("21 config.json is missing", damage.no_config, ["config.json", "no such file"]),
    ("21 config.json is cut off", damage.config_text('{"hidden_size": 8,'), ["config.json", "line 1"]),
    ("21 config.json is far too large", damage.large_config, ["config.json", "5000000", "4000000"]),
    ("21 config.json holds NaN", damage.config_text('{"rope_theta": NaN}'), ["config.json", "NaN"]),
    (
        "21 config.json has a key twice",
        damage.config_text('{"a": 1, "a": 2}'),
        ["config.json", "'a'", "twice"],
    ),
    ("21 config.json is a list", damage.config_text("[]"), ["config.json", "object"]),
    ("22 deep nesting", damage.config_text('{"a":' * 100_000), ["config.json", "nested too deeply"]),
    (
        "22 moderate nesting",
        damage.config_text('{"a":' * 99 + "1" + "}" * 99),
        ["config.json", "nested too deeply"],
    ),
    (
        "23 the files hold fewer blocks",
        damage.one_block_less,
        ["describes 2 blocks", "hold 1", "model.layers."],
    ),
    ("23 the files hold more blocks", damage.one_block_more, ["describes 2 blocks", "hold 3", "other: 2"]),
    ("24 shapes differ", damage.six_other_shapes, ["6 tensors", "[3, 8], expected [12, 8]"]),
    ("25 custom code", damage.settings(auto_map={"AutoModel": "x.Y"}), ["auto_map", "--trust-remote-code"]),
    (
        "25 custom code in an inner configuration",
        damage.settings(text_config={"auto_map": {"AutoConfig": "x.Y"}}),
        ["auto_map", "--revision"],
    ),
    ("27 weights are not finite", damage.not_finite, [FILE, Q, "1 NaN and 2 infinite"]),
    (
        "29 a size in config.json is zero",
        damage.settings(intermediate_size=0),
        ["config.json", "intermediate_size", "0"],
    ),
    ("29 no blocks", damage.settings(num_hidden_layers=0), ["config.json", "num_hidden_layers"]),
    ("29 a size is text", damage.settings(hidden_size="8"), ["config.json", "hidden_size", "whole number"]),
    (
        "29 an inner size is negative",
        damage.settings(text_config={"vocab_size": -1}),
        ["text_config.vocab_size"],
    ),
    ("29 a tensor has a size of zero", damage.size_zero, [Q, "[0, 8]"]),
    ("32 fp8 without scales", damage.as_dtype(torch.float8_e4m3fn), [Q, "quantised (fp8)", "F8_E4M3"]),
    ("33 int8 weights", damage.as_dtype(torch.int8), [Q, "I8", "quantised"]),
    (
        "33 packed weights",
        damage.as_dtype(torch.int32, Q.replace("weight", "qweight")),
        ["qweight", "GPTQ or AWQ"],
    ),
    (
        "33 integers in a norm",
        damage.as_dtype(torch.int64, "model.norm.weight"),
        ["model.norm.weight", "I64", "floating point"],
    ),
    (
        "33 quantization_config",
        damage.settings(quantization_config={"quant_method": "awq", "bits": 4}),
        ["quantization_config", "awq", "bits 4"],
    ),
    ("36 an adapter", damage.adapter, ["adapter_config.json", "merge"]),
    ("37 GGUF", damage.only("model-q4.gguf"), ["GGUF"]),
    ("37 ONNX", damage.only("model.onnx"), ["ONNX"]),
    ("37 MLX arrays", damage.only("weights.npz"), ["MLX"]),
    ("37 MLX in safetensors", damage.mlx, [FILE, "MLX"]),
]


@pytest.mark.parametrize(("spoil", "told"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_folder_is_refused_in_one_line_that_names_the_place(tmp_path: Path, spoil, told) -> None:
    folder = tmp_path / "model"
    spoil(folder)
    before = fingerprint(folder)
    with pytest.raises(InputError) as caught:
        open_strictly(folder)
    error = caught.value
    assert error.exit_code == 3
    for part in told:
        assert part in str(error)
    assert "\n" not in str(error)
    assert str(folder) in str(error)
    assert fingerprint(folder) == before


def test_a_huge_header_allocates_nothing(tmp_path: Path) -> None:
    damage.huge_header(tmp_path)
    tracemalloc.start()
    with pytest.raises(InputError):
        CheckpointReader(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_the_number_of_names_is_limited_over_all_files_together(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path, shards=3)
    monkeypatch.setattr(reader, "MAX_NAMES", len(shapes()) - 1)
    with pytest.raises(InputError, match=f"more than {len(shapes()) - 1} tensors"):
        CheckpointReader(tmp_path)


def test_only_five_of_many_other_shapes_are_named(tmp_path: Path) -> None:
    damage.six_other_shapes(tmp_path)
    with pytest.raises(InputError) as caught:
        open_strictly(tmp_path)
    assert caught.value.message.count("expected [") == 5


def test_custom_code_runs_only_when_the_user_says_so_not_the_file(tmp_path: Path, caplog) -> None:
    write(tmp_path, settings=config(auto_map={"AutoModel": "x.Y"}, trust_remote_code=True))
    opened = CheckpointReader(tmp_path)
    assert "trust_remote_code" not in opened.config
    with pytest.raises(InputError, match="auto_map"):
        open_model(tmp_path)


def test_private_keys_of_a_configuration_are_removed_with_a_warning(tmp_path: Path, caplog) -> None:
    private = {"_attn_implementation_internal": "evil/kernel"}
    write(tmp_path, settings=config(**private, text_config={**private, "vocab_size": 16}))
    before = fingerprint(tmp_path)
    with caplog.at_level(logging.WARNING):
        opened = CheckpointReader(tmp_path)
    assert "internal" not in json.dumps(opened.config)
    assert "'text_config._attn_implementation_internal' is ignored" in caplog.text
    assert fingerprint(tmp_path) == before


def test_a_constant_matrix_is_reported(tmp_path: Path, caplog) -> None:
    content = tensors()
    content[Q].zero_()
    content[HEAD].fill_(0.5)
    content["model.norm.weight"].fill_(1)
    with caplog.at_level(logging.WARNING):
        scan = CheckpointReader(write(tmp_path, content)).scan()
    assert scan.constant == (HEAD, Q)
    assert Q in caplog.text


def test_tied_tensors_with_different_values_are_refused(tmp_path: Path) -> None:
    opened = CheckpointReader(write(tmp_path))
    expected = {name: shape for name, shape in shapes().items() if name != HEAD}
    with pytest.raises(InputError, match=r"ties 'lm_head\.weight' .* the files hold different values"):
        agreement.check(opened, expected, lambda name: False, {HEAD: "model.embed_tokens.weight"})


def test_a_tensor_without_data_is_never_written(tmp_path: Path) -> None:
    meta = torch.empty(2, 2, device="meta")
    with (
        pytest.raises(StructpruneError, match="'a' has no data: it is on the meta device"),
        ShardWriter(tmp_path, {FILE: [("a", meta.dtype, (2, 2))]}, {}) as writer,
    ):
        writer.write("a", meta)
    assert list(tmp_path.iterdir()) == []


def test_mixed_dtypes_are_kept_with_a_warning(tmp_path: Path, caplog) -> None:
    content = tensors(torch.bfloat16) | {HEAD: tensors()[HEAD]}
    with caplog.at_level(logging.WARNING):
        found = open_strictly(write(tmp_path, content, shards=3))
    assert (found[HEAD].dtype, found[Q].dtype) == (torch.float32, torch.bfloat16)
    assert f"mixed dtypes, each tensor keeps its own: BF16 in {len(shapes()) - 1}, F32 in 1" in caplog.text


def test_the_zeros_of_a_model_that_was_pruned_before_are_counted(tmp_path: Path) -> None:
    content = tensors()
    content[Q][:, ::2] = 0
    zeros = CheckpointReader(write(tmp_path, content)).scan().zeros
    assert zeros[Q] == 32


@pytest.mark.parametrize("name", ["config.json", INDEX, shard_name(0, 3), shard_name(1, 3), shard_name(2, 3)])
def test_a_flipped_bit_is_harmless_or_refused(tmp_path: Path, name: str) -> None:
    """Bits of names, sizes and places; in a weight it makes another weight, which only a hash can tell."""
    reference = open_strictly(write(tmp_path, shards=3))
    path = tmp_path / name
    original = path.read_bytes()
    described = len(original) if name.endswith("json") else 8 + len(header_of(path))
    chance = random.Random(name)
    refused = 0
    for _ in range(20):
        raw = bytearray(original)
        raw[chance.randrange(described)] ^= 1 << chance.randrange(8)
        path.write_bytes(raw)
        try:
            found = open_strictly(tmp_path)
        except InputError:
            refused += 1
        else:
            assert found.keys() == reference.keys()
            assert all(torch.equal(found[key], reference[key]) for key in reference)
    assert refused > 0
