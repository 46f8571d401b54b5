"""Ways to damage a tiny checkpoint: each function writes a folder with one thing wrong in it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.checkpoints import (
    change_header,
    change_index,
    config,
    header_of,
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
        file.truncate(5_000_000)


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
