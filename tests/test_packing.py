"""Packed folders: sparse weights stored without their zeros, and back bit by bit."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import structprune
from structprune.checkpoint.manifest import check_manifest
from structprune.checkpoint.packing import Form, holds
from structprune.checkpoint.writing import Writing
from structprune.errors import EnvironmentFailure, InputError, Interrupted, UsageError, VerificationError
from structprune.pipeline.export import export
from structprune.plan import block as plan_block
from structprune.proof.verify import verify
from structprune.pruners import catalogue
from tests.tiny import save_tiny, tiny

EVALUATION = {"text": "demo", "windows": 1, "length": 32, "generations": False}
MODELS = {"llama": (torch.bfloat16, 3), "gpt2": (torch.float32, 1), "mixtral": (torch.float16, 1)}
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder per family that a real run pruned to 2:4."""
    found = {}
    for family, (dtype, shards) in MODELS.items():
        root = tmp_path_factory.mktemp(family)
        save_tiny(family, root / "dense", dtype=dtype, shards=shards)
        pruner = catalogue.find("magnitude")(sparsity="2:4")
        structprune.prune(
            root / "dense", root / "out", pruner, evaluate=EVALUATION, writing=Writing(reload=False)
        )
        found[family] = root / "out"
    return found


@pytest.fixture(scope="module")
def packed(pruned: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny Llama packed, for tests that only read it or copy it."""
    folder = tmp_path_factory.mktemp("packed") / "packed"
    export(str(pruned["llama"]), folder, "2:4")
    return folder


@pytest.fixture
def broken(packed: Path, tmp_path: Path) -> Path:
    """Return a copy of the packed Llama, to be damaged."""
    folder = tmp_path / "broken"
    for path in packed.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(packed)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "fingerprint.json"
    }


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def change(folder: Path, name: str, edit) -> Path:
    """Replace a packed tensor by what `edit` makes of it; return its file."""
    file = next(file for file in sorted(folder.glob("packed-*")) if name in load_file(file))
    tensors = load_file(file)
    save_file(tensors | {name: edit(tensors[name])}, file, {"format": "structprune-packed"})
    return file


class TestForms:
    def test_two_values_and_two_places_for_every_four_inputs(self) -> None:
        weight = torch.tensor([[0.0, 0, 0, 0, 5, 0, 7, 0], [0, 0, 0, 3, -0.0, 0, 0, 4]])
        form = Form(name="w", dtype="F32", shape=(2, 8), scheme="2:4")
        parts = form.pack(weight)
        # Nothing or little to store: the lowest free places fill up, (0, 1) and (0, 3).
        assert parts["w.values"].tolist() == [[0, 0, 5, 7], [0, 3, -0.0, 4]]
        first, second = 0b01_00 | 0b10_00 << 4, 0b11_00 | 0b11_00 << 4
        assert parts["w.indices"].tolist() == [[first], [second]]
        assert torch.equal(bits(form.unpack(parts, "file")), bits(weight))

    def test_a_bitmask_and_what_is_not_zero_in_stored_order(self) -> None:
        weight = torch.tensor([[0.0, 2, 0, -0.0, 0], [0, 0, 0, 0, 9]])
        form = Form(name="w", dtype="F32", shape=(2, 5), scheme="bitmask", kept=3)
        parts = form.pack(weight)
        assert parts["w.values"].tolist() == [2, -0.0, 9]
        assert parts["w.bitmask"].tolist() == [0b00001010, 0b10]
        alive = bits(weight).view(2, 5, 4).any(dim=2)
        assert torch.equal(parts["w.bitmask"], plan_block.pack(alive))
        assert torch.equal(bits(form.unpack(parts, "file")), bits(weight))

    @pytest.mark.parametrize("dtype", NAMES)
    @pytest.mark.parametrize("transposed", [False, True])
    def test_every_bit_comes_back(self, dtype: torch.dtype, transposed: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(24, 64, generator=generator)
        weight[torch.randn(24, 16, 4, generator=generator).argsort(dim=2).view(24, 64) < 2] = 0
        weight[0, 0:4] = torch.tensor([float("nan"), 0.0, -0.0, 0.0])
        weight[1] = 0
        weight = weight.to(dtype)
        weight = weight.T.contiguous() if transposed else weight
        assert holds(weight, transposed)
        shape = tuple(weight.shape)
        for form in (
            Form(name="w", dtype=NAMES[dtype], shape=shape, scheme="2:4", transposed=transposed),
            Form(
                name="w",
                dtype=NAMES[dtype],
                shape=shape,
                scheme="bitmask",
                kept=int((bits(weight).view(*shape, -1) != 0).any(dim=2).sum()),
            ),
        ):
            parts = form.pack(weight)
            assert [(n, p.dtype, tuple(p.shape)) for n, p in parts.items()] == form.entries
            assert torch.equal(bits(form.unpack(parts, "file")), bits(weight))

    def test_minus_zero_takes_a_place_so_three_values_do_not_fit(self) -> None:
        assert holds(torch.tensor([[1.0, 2, 0, 0, 0, 0, 0, 0]]), False)
        assert not holds(torch.tensor([[1.0, 2, -0.0, 0, 0, 0, 0, 0]]), False)
        with pytest.raises(ValueError, match="does not hold"):
            Form(name="w", dtype="F32", shape=(1, 8), scheme="2:4").pack(torch.ones(1, 8))

    def test_a_large_matrix_packs_fast_enough_to_be_bound_by_the_disk(self) -> None:
        weight = torch.zeros(1024, 1024, dtype=torch.bfloat16)
        weight.view(-1, 4)[:, 1:3] = 1
        form = Form(name="w", dtype="BF16", shape=(1024, 1024), scheme="2:4")
        start = time.process_time()
        form.unpack(form.pack(weight), "file")
        assert time.process_time() - start < 1  # a loop over groups in Python takes many


@pytest.mark.parametrize("family", MODELS)
class TestRoundTrip:
    def test_2_4_takes_9_of_16_bytes_and_comes_back_file_by_file(
        self, pruned: dict[str, Path], tmp_path: Path, family: str
    ) -> None:
        source = pruned[family]
        before = files(source)
        report = export(str(source), tmp_path / "packed", "2:4")
        dense, small = stored(source), stored(tmp_path / "packed")
        assert report["same_files"] and len(report["packed"]) == report["linears"]["packed"] > 0
        ratio = 0.5625 if dense[report["packed"][0]].itemsize == 2 else 0.53125
        for name in report["packed"]:
            parts = [small[f"{name}.values"], small[f"{name}.indices"]]
            assert sum(part.nbytes for part in parts) == ratio * dense[name].nbytes
            assert parts[0].shape[1] == parts[1].shape[1] * 4
        assert all(torch.equal(small[row["name"]], dense[row["name"]]) for row in report["left"])
        assert len(report["packed"]) + len(report["left"]) == len(dense)
        back = export(str(tmp_path / "packed"), tmp_path / "back", "dense")
        assert back["bytes"] == report["bytes"]
        expected = files(source)
        assert expected == before
        found = files(tmp_path / "back")
        # All that differs is that the manifest lists another run's fingerprint.
        assert expected.pop("structprune.json") != found.pop("structprune.json")
        assert found == expected
        structprune.load(tmp_path / "back")
        assert verify(tmp_path / "back", source, reload=False).ok
        assert check_manifest(tmp_path / "packed") == check_manifest(tmp_path / "back") == []

    def test_a_bitmask_takes_a_bit_per_weight_and_the_values(
        self, pruned: dict[str, Path], tmp_path: Path, family: str
    ) -> None:
        report = export(str(pruned[family]), tmp_path / "packed", "bitmask")
        dense, small = stored(pruned[family]), stored(tmp_path / "packed")
        for name in report["packed"]:
            kept = int((dense[name] != 0).sum())
            assert small[f"{name}.values"].shape == (kept,)
            assert small[f"{name}.bitmask"].nbytes == -(-dense[name].numel() // 8)
        export(str(tmp_path / "packed"), tmp_path / "back", "dense")
        weights = {name for name in files(pruned[family]) if name.endswith((".safetensors", ".index.json"))}
        assert {n: files(tmp_path / "back")[n] for n in weights} == {
            n: files(pruned[family])[n] for n in weights
        }


def test_experts_and_transposed_linears_are_packed_along_their_inputs(
    pruned: dict[str, Path], tmp_path: Path
) -> None:
    mixtral = export(str(pruned["mixtral"]), tmp_path / "mixtral", "2:4")
    assert sum("experts" in name for name in mixtral["packed"]) == 2 * 4 * 3
    assert not any(".gate." in name for name in mixtral["packed"])
    gpt2 = export(str(pruned["gpt2"]), tmp_path / "gpt2", "2:4")
    name = next(name for name in gpt2["packed"] if name.endswith("h.0.mlp.c_fc.weight"))
    assert stored(pruned["gpt2"])[name].shape == (64, 96)
    assert stored(tmp_path / "gpt2")[f"{name}.values"].shape == (96, 32)


def test_a_plain_folder_is_packed_too_and_what_does_not_hold_the_pattern_is_named(tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight").data
    weight.view(-1, 4)[:, :2] = 0
    model.save_pretrained(tmp_path / "plain")
    report = export(str(tmp_path / "plain"), tmp_path / "packed", "2:4")
    assert report["packed"] == ["model.layers.1.mlp.up_proj.weight"]
    reasons = {row["name"]: row["reason"] for row in report["left"]}
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "more than 2 weights in a group of 4 inputs"
    assert reasons["model.norm.weight"] == "no linear of a decoder block"
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert "quantization_config" not in config
    export(str(tmp_path / "packed"), tmp_path / "back", "dense")
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    structprune.load(tmp_path / "back")


def test_a_header_spelled_otherwise_gives_the_same_tensors_and_is_named(tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data.view(-1, 4)[:, :2] = 0
    model.save_pretrained(tmp_path / "plain")
    file = tmp_path / "plain" / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    text = file.read_bytes()[8 : 8 + length].rstrip() + b" " * 64
    file.write_bytes(len(text).to_bytes(8, "little") + text + file.read_bytes()[8 + length :])
    report = export(str(tmp_path / "plain"), tmp_path / "packed", "2:4")
    assert (report["same_files"], report["respelled"]) == (False, ["model.safetensors"])
    export(str(tmp_path / "packed"), tmp_path / "back", "dense")
    before, after = load_file(file), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


class TestNoLoaderIsFooled:
    def test_ours_names_the_way_back(self, packed: Path) -> None:
        with pytest.raises(InputError, match="--to dense"):
            structprune.load(packed)

    def test_transformers_finds_no_weights(self, packed: Path) -> None:
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            AutoModelForCausalLM.from_pretrained(packed)

    def test_a_renamed_file_is_refused_by_ours(self, pruned: dict[str, Path], tmp_path: Path) -> None:
        export(str(pruned["mixtral"]), tmp_path / "one", "2:4")
        (file,) = (tmp_path / "one").glob("packed-*")
        file.rename(tmp_path / "one" / "model.safetensors")
        # Even where all that says whose folder it is has gone.
        shutil.rmtree(tmp_path / "one" / "structprune")
        (tmp_path / "one" / "structprune.json").unlink()
        with pytest.raises(InputError, match="structprune-packed"):
            structprune.inspect(str(tmp_path / "one"))


class TestRefusals:
    def test_of_a_dense_model(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no linear of its decoder blocks holds 2:4") as caught:
            export(str(llama), tmp_path / "out", "2:4")
        assert "--sparsity 2:4" in caught.value.hint
        with pytest.raises(InputError, match="zeros enough"):
            export(str(llama), tmp_path / "out", "bitmask")
        with pytest.raises(InputError, match="is not packed"):
            export(str(llama), tmp_path / "out", "dense")
        assert not list(tmp_path.iterdir())

    def test_of_other_words_and_of_packing_twice(self, packed: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="1:4"):
            export(str(packed), tmp_path / "out", "1:4")
        with pytest.raises(InputError, match="packed to be stored"):
            export(str(packed), tmp_path / "out", "bitmask")

    def test_of_an_output_that_exists_until_told(self, pruned: dict[str, Path], tmp_path: Path) -> None:
        export(str(pruned["llama"]), tmp_path / "out", "2:4")
        before = files(tmp_path / "out")
        with pytest.raises(EnvironmentFailure, match="exists"):
            export(str(pruned["llama"]), tmp_path / "out", "2:4")
        assert files(tmp_path / "out") == before
        export(str(pruned["llama"]), tmp_path / "out", "bitmask", writing=Writing(overwrite=True))
        assert files(tmp_path / "out") != before
        assert not list(tmp_path.glob("out.*"))

    def test_a_stopped_export_leaves_nothing_behind(
        self, pruned: dict[str, Path], packed: Path, tmp_path: Path
    ) -> None:
        def stop(stage: str, done: int, total: int) -> None:
            if (stage, done) == ("pack", 9):
                raise Interrupted(15)

        with pytest.raises(Interrupted):
            export(str(pruned["llama"]), tmp_path / "out", "2:4", progress=stop)
        assert not list(tmp_path.glob("out*"))
        export(str(pruned["llama"]), tmp_path / "out", "2:4")
        assert stored(tmp_path / "out").keys() == stored(packed).keys()
        assert not list(tmp_path.glob("out.*"))

    def test_of_a_folder_without_its_manifest(self, broken: Path, tmp_path: Path) -> None:
        (broken / "structprune.json").unlink()
        with pytest.raises(InputError, match="no manifest"):
            export(str(broken), tmp_path / "out", "dense")


NAME = "model.layers.0.mlp.up_proj.weight"


class TestDamage:
    def refused(self, folder: Path, tmp_path: Path, *said: str) -> None:
        with pytest.raises(InputError) as caught:
            export(str(folder), tmp_path / "out", "dense")
        assert all(word in str(caught.value) for word in said), str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_indices_out_of_order(self, broken: Path, tmp_path: Path) -> None:
        def swap(indices: Tensor) -> Tensor:
            indices[5, 1] = 0b00_01 | 0b01_00 << 4
            return indices

        file = change(broken, f"{NAME}.indices", swap)
        self.refused(broken, tmp_path, file.name, f"{NAME}.indices", "row 5", "not in order")

    def test_another_place_that_is_in_order(self, broken: Path, tmp_path: Path) -> None:
        def move(indices: Tensor) -> Tensor:
            indices[0, 0] = 0b1110_1110 if indices[0, 0] != 0b1110_1110 else 0b0100_0100
            return indices

        file = change(broken, f"{NAME}.indices", move)
        self.refused(broken, tmp_path, file.name, "other bytes than were packed")

    def test_a_wrong_shape(self, broken: Path, tmp_path: Path) -> None:
        file = change(broken, f"{NAME}.values", lambda values: values[:, :-1].contiguous())
        self.refused(broken, tmp_path, file.name, f"{NAME}.values", "BF16 [96, 31]", "BF16 [96, 32]")

    def test_a_file_cut_off_or_missing(self, broken: Path, tmp_path: Path) -> None:
        file = sorted(broken.glob("packed-*"))[1]
        data = file.read_bytes()
        file.write_bytes(data[:-7])
        self.refused(broken, tmp_path, file.name, "cut off")
        file.unlink()
        self.refused(broken, tmp_path, file.name, "no such file")

    def test_a_tensor_too_few_or_too_many(self, broken: Path, tmp_path: Path) -> None:
        file = sorted(broken.glob("packed-*"))[0]
        tensors = load_file(file)
        name = next(iter(tensors))
        note = {"format": "structprune-packed"}
        save_file({key: value for key, value in tensors.items() if key != name}, file, note)
        self.refused(broken, tmp_path, file.name, name, "missing")
        save_file(tensors | {"stray": torch.ones(1)}, file, note)
        self.refused(broken, tmp_path, file.name, "'stray'")

    def test_a_file_beside_the_weights_that_changed_or_is_gone(self, broken: Path, tmp_path: Path) -> None:
        file = broken / "structprune" / "source" / "model.safetensors.index.json"
        before = file.read_text()
        file.write_text(before + " ")
        self.refused(broken, tmp_path, file.name, "changed")
        file.write_text(before)
        (broken / "tokenizer.json").unlink()
        self.refused(broken, tmp_path, "tokenizer.json", "missing")

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ('"format": 1', '"format": 2', "format"),
            ('"scheme": "2:4"', '"scheme": "1:4"', "scheme"),
            ('"dtype": "BF16"', '"dtype": "BF17"', "BF17"),
            ('"shape": [64, 64]', '"shape": [64, 60]', "no groups of four"),
            ('"shape": [96, 64]', '"shape": [96, -64]', "shape"),
            ('"dense": "model', '"dense": "../model', "dense"),
            ('"dense": "model-00002', '"dense": "model-00001', "named twice"),
            ("{", "", "JSON"),
            ('"dense": "model-00001', '"dense": "model-00009', "changed"),
        ],
    )
    def test_packing_json(self, broken: Path, tmp_path: Path, old: str, new: str, said: str) -> None:
        file = broken / "structprune" / "packing.json"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new, 1))
        self.refused(broken, tmp_path, "packing.json", said)

    def test_a_bitmask_with_a_bit_too_many(self, pruned: dict[str, Path], tmp_path: Path) -> None:
        export(str(pruned["llama"]), tmp_path / "packed", "bitmask")

        def fill(bitmask: Tensor) -> Tensor:
            bitmask[0] = 255
            return bitmask

        file = change(tmp_path / "packed", f"{NAME}.bitmask", fill)
        self.refused(tmp_path / "packed", tmp_path, file.name, f"{NAME}.bitmask", "bits are set")


def test_a_disk_that_gives_back_other_bytes_is_found_before_anything_is_published(
    pruned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Form.unpack
    monkeypatch.setattr(Form, "unpack", lambda form, *parts: honest(form, *parts) * 1.5)
    with pytest.raises(VerificationError, match="unpacks to other bytes"):
        export(str(pruned["llama"]), tmp_path / "out", "2:4")
    assert not (tmp_path / "out").exists()


class TestCommand:
    def test_there_and_back(self, pruned: dict[str, Path], tmp_path: Path, command) -> None:
        done = command("export", pruned["llama"], tmp_path / "packed", "--to", "2:4", "--json")
        assert (done.code, done.json["status"], done.json["same_files"]) == (0, "ok", True)
        assert done.json["linears"]["packed_bytes"] == 0.5625 * done.json["linears"]["dense_bytes"]
        assert "pack: 21 of 21" in done.err
        done = command("export", tmp_path / "packed", tmp_path / "back", "--to", "dense")
        assert done.code == 0 and "4 weight files" in done.out

    def test_the_text_says_what_was_saved_and_what_loads_it(
        self, pruned: dict[str, Path], tmp_path: Path, command
    ) -> None:
        done = command("export", pruned["llama"], tmp_path / "packed", "--to", "2:4")
        assert done.code == 0
        assert "56.25% of the dense bytes" in done.out and "loads in" in done.out

    def test_a_damaged_plan_is_not_packed(self, pruned: dict[str, Path], tmp_path: Path, command) -> None:
        folder = shutil.copytree(pruned["llama"], tmp_path / "in")
        (block, *_) = sorted(folder.glob("structprune/plans/*/block-*.safetensors"))
        raw = bytearray(block.read_bytes())
        raw[-1] ^= 1
        block.write_bytes(raw)
        done = command("export", folder, tmp_path / "packed", "--to", "2:4")
        assert done.code == 3 and block.name in done.err
        assert not (tmp_path / "packed").exists()

    def test_exit_codes(self, llama: Path, packed: Path, tmp_path: Path, command) -> None:
        assert command("export", llama, tmp_path / "out").code == 2
        assert command("export", llama, tmp_path / "out", "--to", "3:4").code == 2
        assert command("export", llama, tmp_path / "out", "--to", "2:4").code == 3
        assert command("export", packed, packed, "--to", "dense").code == 2
        assert command("export", packed, llama, "--to", "dense").code == 4
        assert command("export", tmp_path / "nowhere", tmp_path / "out", "--to", "2:4").code == 3
