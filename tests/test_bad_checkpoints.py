"""One test per kind of damaged, hostile or unsupported model folder; the input is never touched."""

import json
import logging
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from structprune.errors import InputError, StructpruneError
from structprune.storage import agreement, reader
from structprune.storage.reader import CheckpointReader, refuse_custom_code
from structprune.storage.writer import ShardWriter
from tests.checkpoints import (
    change_header,
    change_index,
    config,
    fingerprint,
    header_of,
    open_strictly,
    shapes,
    shard_name,
    tensors,
    write,
    write_index,
)

Q = "model.layers.0.self_attn.q_proj.weight"
HEAD = "lm_head.weight"
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def cut_off(folder: Path) -> None:
    raw = (write(folder, shards=3) / shard_name(1, 3)).read_bytes()
    (folder / shard_name(1, 3)).write_bytes(raw[:-100])


def empty(folder: Path) -> None:
    (write(folder, shards=3) / shard_name(2, 3)).write_bytes(b"")


def cut_inside_header(folder: Path) -> None:
    (write(folder) / FILE).write_bytes((folder / FILE).read_bytes()[:200])


def huge_header(folder: Path) -> None:
    raw = (write(folder) / FILE).read_bytes()
    (folder / FILE).write_bytes((2**62).to_bytes(8, "little") + raw[8:])


def overlapping(folder: Path) -> None:
    change_header(write(folder) / FILE, lambda header: header[Q].update(data_offsets=[0, 256]))


def holed(folder: Path) -> None:
    def shift(header: dict) -> None:
        for entry in header.values():
            if entry.get("data_offsets", [0])[0] > 0:
                entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]

    change_header(write(folder) / FILE, shift)


def trailing(folder: Path) -> None:
    (write(folder) / FILE).write_bytes((folder / FILE).read_bytes() + b"\0" * 16)


def overflowing(folder: Path) -> None:
    change_header(write(folder) / FILE, lambda header: header[Q].update(shape=[2**62, 2**62]))


def overflowing_behind_a_zero(folder: Path) -> None:
    def change(header: dict) -> None:
        start = header[HEAD]["data_offsets"][0]
        header["ghost.weight"] = {"dtype": "F32", "shape": [0, 2**62, 8], "data_offsets": [start, start]}

    change_header(write(folder) / FILE, change)


def negative_size(folder: Path) -> None:
    change_header(write(folder) / FILE, lambda header: header[Q].update(shape=[-8, -8]))


def twice_in_header(folder: Path) -> None:
    header = header_of(write(folder) / FILE).rstrip()
    entry = json.dumps(json.loads(header)[Q])
    change_header(folder / FILE, header[:-1] + f', "{Q}": {entry}}}'.encode())


def too_long_header(folder: Path) -> None:
    write(folder)
    with (folder / FILE).open("wb") as file:
        file.write((33_000_000).to_bytes(8, "little") + b"{")
        file.truncate(40_000_000)


def unknown_dtype(folder: Path) -> None:
    change_header(write(folder) / FILE, lambda header: header[Q].update(dtype="F4"))


def header_not_utf8(folder: Path) -> None:
    header = header_of(write(folder) / FILE)
    change_header(folder / FILE, header.replace(b"lm_head", b"lm_h\xffad"))


def index_not_utf8(folder: Path) -> None:
    path = write(folder, shards=3) / INDEX
    path.write_bytes(path.read_bytes().replace(b"lm_head", b"lm_h\xffad"))


def two_missing_shards(folder: Path) -> None:
    write(folder, shards=3)
    (folder / shard_name(0, 3)).unlink()
    (folder / shard_name(2, 3)).unlink()


def index_missing(folder: Path) -> None:
    (write(folder, shards=3) / INDEX).unlink()


def listed_but_absent(folder: Path) -> None:
    change_index(write(folder, shards=3), **{"model.layers.9.ghost.weight": shard_name(1, 3)})


def not_in_index(folder: Path) -> None:
    change_index(write(folder, shards=3), **{Q: None})


def shard_not_in_index(folder: Path) -> None:
    save_file({"x": torch.ones(1)}, write(folder, shards=3) / "model-00004-of-00004.safetensors")


def unexpected_tensor(folder: Path) -> None:
    write(folder, tensors() | {"model.surprise.weight": torch.ones(2, 2)})


def missing_tensor(folder: Path) -> None:
    write(folder, {name: tensor for name, tensor in tensors().items() if name != Q})


def in_two_shards(folder: Path) -> None:
    write(folder, shards=3)
    part = {name: tensor for name, tensor in tensors().items() if name == HEAD}
    home = json.loads((folder / INDEX).read_text())["weight_map"]
    other = shard_name(0, 3) if home[HEAD] != shard_name(0, 3) else shard_name(1, 3)
    stay = {name: tensors()[name] for name, file in home.items() if file == other}
    save_file(stay | part, folder / other)


def key_twice_in_index(folder: Path) -> None:
    path = write(folder, shards=3) / INDEX
    path.write_text(path.read_text().replace(f'"{Q}"', f'"{HEAD}"'))


def weight_map_value(value: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        write(folder, shards=3)
        change_index(folder, **{Q: value})  # type: ignore[arg-type]  # wrong on purpose

    return damage


def index_is(content: object) -> Callable[[Path], None]:
    return lambda folder: write_index(write(folder, shards=3), content)


def link_outside(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere.safetensors"
    (write(folder) / FILE).rename(elsewhere)
    (folder / FILE).symlink_to(elsewhere)


def link_in_a_circle(folder: Path) -> None:
    (write(folder) / FILE).unlink()
    (folder / FILE).symlink_to(FILE)


def pipe(folder: Path) -> None:
    (write(folder) / FILE).unlink()
    os.mkfifo(folder / FILE)


def folder_as_shard(folder: Path) -> None:
    (write(folder, shards=3) / shard_name(0, 3)).unlink()
    (folder / shard_name(0, 3)).mkdir()


def only(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (write(folder) / FILE).unlink()
        for name in names:
            (folder / name).write_bytes(b"\x80\x02")

    return damage


def config_text(text: str | bytes) -> Callable[[Path], None]:
    raw = text if isinstance(text, bytes) else text.encode()

    def damage(folder: Path) -> None:
        (write(folder) / "config.json").write_bytes(raw)

    return damage


def no_config(folder: Path) -> None:
    (write(folder) / "config.json").unlink()


def large_config(folder: Path) -> None:
    with (write(folder) / "config.json").open("ab") as file:
        file.truncate(100_000_000)


def settings(**changes: object) -> Callable[[Path], None]:
    return lambda folder: write(folder, settings=config(**changes)) and None


def one_block_less(folder: Path) -> None:
    write(folder, {name: tensor for name, tensor in tensors().items() if ".layers.1." not in name})


def one_block_more(folder: Path) -> None:
    extra = {name.replace(".layers.1.", ".layers.2."): tensor.clone() for name, tensor in tensors().items()}
    write(folder, tensors() | extra)


def six_other_shapes(folder: Path) -> None:
    content = tensors()
    for name in [name for name in content if "mlp" in name]:
        content[name] = torch.ones(3, 8)
    write(folder, content)


def not_finite(folder: Path) -> None:
    content = tensors(torch.bfloat16)
    content[Q][0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    write(folder, content)


def size_zero(folder: Path) -> None:
    content = tensors()
    content[Q] = torch.empty(0, 8)
    write(folder, content)


def as_dtype(dtype: torch.dtype, name: str = Q) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = tensors()
        content[name] = content.get(name, content[Q]).to(dtype)
        write(folder, content)

    return damage


def adapter(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")


def mlx(folder: Path) -> None:
    save_file(tensors(), write(folder) / FILE, {"format": "mlx"})


def private_name(folder: Path) -> None:
    change_header(write(folder) / FILE, header_of(folder / FILE).replace(b"lm_head", b"lm\\nead"))


BAD = [
    ("1 a shard is cut off", cut_off, [shard_name(1, 3), "bytes, expected", "cut off"]),
    ("1 a file is cut off inside its header", cut_inside_header, [FILE, "200 bytes"]),
    ("2 a shard is empty", empty, [shard_name(2, 3), "empty", "interrupted"]),
    ("3 the header claims 2^62 bytes", huge_header, [FILE, str(2**62)]),
    ("4 tensors overlap", overlapping, [FILE, "overlaps"]),
    ("4 there is a hole between tensors", holed, [FILE, "hole"]),
    ("4 bytes follow the last tensor", trailing, [FILE, "without a meaning"]),
    ("5 a shape overflows", overflowing, [FILE, Q, "larger than any memory"]),
    ("5 a shape overflows beside a zero", overflowing_behind_a_zero, [FILE, "ghost.weight"]),
    ("5 a size is negative", negative_size, [FILE, Q, "-8"]),
    ("6 a name is twice in a header", twice_in_header, [FILE, Q, "twice"]),
    ("7 the header is longer than the limit", too_long_header, [FILE, "33000000", "32000000"]),
    ("8 a dtype is unknown", unknown_dtype, [FILE, Q, "'F4'", "BF16"]),
    ("9 the header is not UTF-8", header_not_utf8, [FILE, "not UTF-8", "0xff"]),
    ("9 the index is not UTF-8", index_not_utf8, [INDEX, "not UTF-8", "0xff"]),
    ("9 a name holds a line break", private_name, [FILE, "unprintable"]),
    ("10 shards are missing", two_missing_shards, [shard_name(0, 3), shard_name(2, 3), "2 of 3"]),
    ("10 the index is missing", index_missing, ["3 shards", INDEX]),
    ("11 a listed tensor is absent", listed_but_absent, [INDEX, "ghost.weight", shard_name(1, 3)]),
    ("11 a tensor of the model is absent", missing_tensor, [Q, "missing"]),
    ("12 a tensor is not in the index", not_in_index, [INDEX, Q]),
    ("12 a shard is not in the index", shard_not_in_index, ["model-00004-of-00004.safetensors", INDEX]),
    ("12 a tensor is not part of the model", unexpected_tensor, ["model.surprise.weight", "not part"]),
    ("13 a tensor is in two shards", in_two_shards, [HEAD, shard_name(0, 3), "two files"]),
    ("14 a key is twice in the index", key_twice_in_index, [INDEX, HEAD, "twice"]),
    ("15 the index is a list", index_is([]), [INDEX, "weight_map"]),
    ("15 the index is null", index_is(None), [INDEX, "weight_map"]),
    ("15 weight_map is a list", index_is({"weight_map": []}), [INDEX, "weight_map"]),
    ("15 a value of weight_map is a number", weight_map_value(3), [INDEX, Q, "plain file name"]),
    ("16 weight_map leads up", weight_map_value("../../x.safetensors"), [INDEX, Q, "plain file name"]),
    ("17 weight_map leads to the root", weight_map_value("/x.safetensors"), [INDEX, Q, "plain file name"]),
    ("17 weight_map leads to a drive", weight_map_value("C:\\x.safetensors"), [INDEX, Q, "plain file name"]),
    ("17 weight_map names a pickle", weight_map_value("model.bin"), [INDEX, Q, "plain file name"]),
    ("18 a link leaves the folder", link_outside, [FILE, "leads out", "--allow-external-symlinks"]),
    ("18 a link leads in a circle", link_in_a_circle, [FILE, "link"]),
    ("19 a file is a pipe", pipe, [FILE, "a pipe"]),
    ("19 a file is a folder", folder_as_shard, [shard_name(0, 3), "a folder"]),
    ("20 pickles only", only("pytorch_model.bin"), ["pytorch_model.bin", "pickle"]),
    ("20 nothing at all", only(), ["no weights"]),
    ("20 weights under another name", only("weights.safetensors"), ["weights.safetensors", FILE]),
    ("21 config.json is missing", no_config, ["config.json", "no such file"]),
    ("21 config.json is cut off", config_text('{"hidden_size": 8,'), ["config.json", "line 1"]),
    ("21 config.json has 100 MB", large_config, ["config.json", "1000000", "4000000"]),
    ("21 config.json holds NaN", config_text('{"rope_theta": NaN}'), ["config.json", "NaN"]),
    ("21 config.json has a key twice", config_text('{"a": 1, "a": 2}'), ["config.json", "'a'", "twice"]),
    ("21 config.json is a list", config_text("[]"), ["config.json", "object"]),
    ("22 deep nesting", config_text('{"a":' * 100_000), ["config.json", "nested too deeply"]),
    ("22 moderate nesting", config_text('{"a":' * 99 + "1" + "}" * 99), ["config.json", "nested too deeply"]),
    ("23 the files hold fewer blocks", one_block_less, ["describes 2 blocks", "hold 1", "model.layers."]),
    ("23 the files hold more blocks", one_block_more, ["describes 2 blocks", "hold 3", "other: 2"]),
    ("24 shapes differ", six_other_shapes, ["6 tensors", "[3, 8], expected [12, 8]"]),
    ("25 custom code", settings(auto_map={"AutoModel": "x.Y"}), ["auto_map", "--trust-remote-code"]),
    (
        "25 custom code in an inner configuration",
        settings(text_config={"auto_map": {"AutoConfig": "x.Y"}}),
        ["auto_map", "--revision"],
    ),
    ("27 weights are not finite", not_finite, [FILE, Q, "1 NaN and 2 infinite"]),
    (
        "29 a size in config.json is zero",
        settings(intermediate_size=0),
        ["config.json", "intermediate_size", "0"],
    ),
    ("29 no blocks", settings(num_hidden_layers=0), ["config.json", "num_hidden_layers"]),
    ("29 a size is text", settings(hidden_size="8"), ["config.json", "hidden_size", "whole number"]),
    ("29 an inner size is negative", settings(text_config={"vocab_size": -1}), ["text_config.vocab_size"]),
    ("29 a tensor has a size of zero", size_zero, [Q, "[0, 8]"]),
    ("32 fp8 without scales", as_dtype(torch.float8_e4m3fn), [Q, "quantised (fp8)", "F8_E4M3"]),
    ("33 int8 weights", as_dtype(torch.int8), [Q, "I8", "quantised"]),
    ("33 packed weights", as_dtype(torch.int32, Q.replace("weight", "qweight")), ["qweight", "GPTQ or AWQ"]),
    (
        "33 integers in a norm",
        as_dtype(torch.int64, "model.norm.weight"),
        ["model.norm.weight", "I64", "floating point"],
    ),
    (
        "33 quantization_config",
        settings(quantization_config={"quant_method": "awq", "bits": 4}),
        ["quantization_config", "awq", "bits 4"],
    ),
    ("36 an adapter", adapter, ["adapter_config.json", "merge"]),
    ("37 GGUF", only("model-q4.gguf"), ["GGUF"]),
    ("37 ONNX", only("model.onnx"), ["ONNX"]),
    ("37 MLX arrays", only("weights.npz"), ["MLX"]),
    ("37 MLX in safetensors", mlx, [FILE, "MLX"]),
]


@pytest.mark.parametrize(("damage", "told"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_folder_is_refused_in_one_line_that_names_the_place(tmp_path: Path, damage, told) -> None:
    folder = tmp_path / "model"
    damage(folder)
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
    huge_header(tmp_path)
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
    six_other_shapes(tmp_path)
    with pytest.raises(InputError) as caught:
        open_strictly(tmp_path)
    assert caught.value.message.count("expected [") == 5


def test_custom_code_runs_only_when_the_user_says_so_not_the_file(tmp_path: Path, caplog) -> None:
    write(tmp_path, settings=config(auto_map={"AutoModel": "x.Y"}, trust_remote_code=True))
    opened = CheckpointReader(tmp_path)
    assert "trust_remote_code" not in opened.config
    with pytest.raises(InputError, match="auto_map"):
        refuse_custom_code(opened, trust_remote_code=False)
    refuse_custom_code(opened, trust_remote_code=True)


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
    """Bits of names, sizes and places; a flipped bit of a weight is another weight, which only a hash can tell."""
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
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert found.keys() == reference.keys()
            assert all(torch.equal(found[key], reference[key]) for key in reference)
    assert refused > 0
