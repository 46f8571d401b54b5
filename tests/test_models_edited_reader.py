"""A checkpoint with a plan carried out is itself a checkpoint, and a live model becomes the same."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from structprune.errors import InputError
from structprune.models.edit import carry_out, temporarily
from structprune.models.edited_reader import EditedReader
from structprune.models.identity import architecture_of, names_of
from structprune.models.opening import Opening
from structprune.models.streamed import StreamedModel, open_model
from structprune.plan.key import EDITS, Key
from structprune.plan.origin import Origin
from structprune.plan.plan import Plan, PlanWriter
from structprune.storage.reader import CheckpointReader
from tests.tiny import save_tiny

BLOCK = "model.layers.0"
UP, DOWN, GATE = (f"{BLOCK}.mlp.{name}_proj.weight" for name in ("up", "down", "gate"))
Q = f"{BLOCK}.self_attn.q_proj.weight"
BIAS = f"{BLOCK}.self_attn.o_proj.bias"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "llama", shards=2, dtype=torch.bfloat16)


def plan_of(folder: Path, tensors: dict[Key, Tensor], patch: dict[str, object] | None = None) -> Plan:
    architecture = architecture_of(open_model(folder, Opening(stream=True)))
    writer = PlanWriter(None, Origin("by hand", {}, architecture, "0" * 64))
    writer.write(tensors, {})
    return writer.finish({}, patch=patch)


def kept_channels() -> dict[Key, Tensor]:
    """Keep every second channel of the first block's feed-forward: 48 of 96."""
    kept = torch.arange(0, 96, 2)
    return {Key(UP, "keep.0"): kept, Key(GATE, "keep.0"): kept, Key(DOWN, "keep.1"): kept}


class TestReading:
    def test_what_is_masked_is_plus_zero_and_what_is_new_is_new(self, folder: Path) -> None:
        below = CheckpointReader(folder)
        mask = torch.zeros(96, 64, dtype=torch.bool)
        mask[:, ::2] = True
        value = torch.full((64, 96), 2.0, dtype=torch.bfloat16)
        reader = EditedReader(below, plan_of(folder, {Key(UP, "mask"): mask, Key(DOWN, "value"): value}))
        assert torch.equal(reader.read(UP), torch.where(mask, below.read(UP), 0))
        assert not reader.read(UP)[:, 1].view(torch.int16).any()
        assert torch.equal(reader.read(DOWN), value)
        assert torch.equal(reader.read(Q), below.read(Q))
        assert reader.layout == below.layout

    def test_dropped_cut_and_created_tensors_are_gone_smaller_and_beside_their_module(
        self, folder: Path
    ) -> None:
        below = CheckpointReader(folder)
        bias = torch.arange(64, dtype=torch.bfloat16)
        drop = {Key(Q, "drop"): torch.empty(0)}
        reader = EditedReader(below, plan_of(folder, {**kept_channels(), **drop, Key(BIAS, "value"): bias}))
        assert Q not in reader.shapes
        with pytest.raises(InputError, match="no tensor"):
            reader.read(Q)
        assert reader.shapes[UP] == (48, 64)
        assert torch.equal(reader.read(UP), below.read(UP)[::2])
        assert torch.equal(reader.read(DOWN), below.read(DOWN)[:, ::2])
        assert torch.equal(reader.read(BIAS), bias)
        assert reader.tensors[BIAS].file == below.tensors[BIAS.replace("bias", "weight")].file
        order = [name for names in reader.shards.values() for name in names]
        assert order.index(BIAS) == order.index(BIAS.replace("bias", "weight")) + 1
        assert order == [entry[0] for entries in reader.layout.values() for entry in entries]
        assert reader.nbytes == below.nbytes - 2 * (64 * 64 + 3 * 48 * 64) + 2 * 64

    def test_a_later_stage_sees_the_names_and_shapes_that_are_left(self, folder: Path) -> None:
        below = CheckpointReader(folder)
        first = EditedReader(below, plan_of(folder, kept_channels()))
        mask = torch.ones(48, 64, dtype=torch.bool)
        mask[0] = False
        second = EditedReader(first, plan_of(folder, {Key(UP, "mask"): mask}))
        assert torch.equal(second.read(UP)[1:], below.read(UP)[2::2])
        assert not second.read(UP)[0].any()

    def test_a_mask_of_the_shape_before_is_refused_by_name(self, folder: Path) -> None:
        whole = torch.ones(96, 64, dtype=torch.bool)
        reader = EditedReader(
            CheckpointReader(folder), plan_of(folder, {**kept_channels(), Key(UP, "mask"): whole})
        )
        with pytest.raises(InputError, match=r"up_proj.*mask has shape \[96, 64\], the tensor \[48, 64\]"):
            reader.read(UP)

    def test_a_created_tensor_without_a_module_is_refused(self, folder: Path) -> None:
        plan = plan_of(folder, {Key("model.nowhere.bias", "value"): torch.zeros(3)})
        with pytest.raises(InputError, match=r"'model\.nowhere\.bias'"):
            EditedReader(CheckpointReader(folder), plan)

    def test_patches_add_up_group_by_group(self, folder: Path) -> None:
        first = EditedReader(CheckpointReader(folder), plan_of(folder, {}, {"a": {"x": 1}, "b": 2}))
        second = EditedReader(first, plan_of(folder, {}, {"a": {"y": 3}}))
        assert second.patch == {"a": {"x": 1, "y": 3}, "b": 2}
        assert (second.config["a"], second.config["hidden_size"]) == ({"x": 1, "y": 3}, 64)


class TestLiveModels:
    def test_a_resident_and_a_streamed_model_become_the_same(self, folder: Path) -> None:
        """All blocks lose every second channel, so that a native config describes what is left."""
        tensors: dict[Key, Tensor] = {}
        for block in (0, 1):
            for key, kept in kept_channels().items():
                tensors[Key(key.name.replace("layers.0", f"layers.{block}"), key.kind)] = kept
        plan = plan_of(folder, tensors, {"intermediate_size": 48})
        models = [open_model(folder, Opening(stream=stream)) for stream in (False, True)]
        for model in models:
            carry_out(model, plan)
        resident, streamed = models
        assert isinstance(resident, PreTrainedModel)
        assert isinstance(streamed, StreamedModel)
        assert architecture_of(resident) == architecture_of(streamed)
        assert names_of(resident).stored_of == names_of(streamed).stored_of
        linear = resident.get_submodule(f"{BLOCK}.mlp.up_proj")
        assert (linear.in_features, linear.out_features) == (64, 48)
        with streamed.resident(""):
            for name, value in resident.state_dict().items():
                assert torch.equal(value, streamed.skeleton.state_dict()[name]), name
            probe = torch.arange(3, 13)[None]
            assert torch.equal(resident(probe).logits, streamed.skeleton(probe).logits)

    def test_a_plan_of_wrong_shapes_leaves_the_model_as_it_was(self, folder: Path) -> None:
        model = open_model(folder)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        good, bad = torch.zeros(64, 64, dtype=torch.bool), torch.zeros(5, 64, dtype=torch.bool)
        with pytest.raises(InputError, match=r"up_proj.*mask has shape \[5, 64\], the tensor \[96, 64\]"):
            carry_out(model, plan_of(folder, {Key(Q, "mask"): good, Key(UP, "mask"): bad}))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_for_a_while_means_that_every_bit_and_module_comes_back(self, folder: Path) -> None:
        model = open_model(folder)
        assert isinstance(model, PreTrainedModel)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        modules = [*model.modules()]
        bias, mask = torch.ones(64, dtype=torch.bfloat16), torch.zeros(64, 64, dtype=torch.bool)
        plan = plan_of(folder, {**kept_channels(), Key(BIAS, "value"): bias, Key(Q, "mask"): mask})
        block = model.get_submodule(BLOCK)
        with temporarily(block, BLOCK, plan, names_of(model)):
            assert model.get_parameter(UP).shape == (48, 64)
            assert torch.equal(model.get_parameter(BIAS), bias)
            assert not model.get_parameter(Q).any()
        assert [*model.modules()] == modules
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.get_submodule(f"{BLOCK}.mlp.up_proj").out_features == 96


class TestKeys:
    @pytest.mark.parametrize("ask", [lambda plan: plan["x:mask"], lambda plan: "x:mask" in plan])
    def test_a_plan_indexed_by_a_string_raises(self, ask, folder: Path) -> None:
        plan = plan_of(folder, {Key("x", "mask"): torch.ones(2, dtype=torch.bool)})
        for decisions in (plan, plan.blocks[0]):
            with pytest.raises(TypeError, match="indexed by Key"):
                ask(decisions)

    def test_every_kind_is_one_of_seven_edits(self) -> None:
        assert set(EDITS.values()) == {"mask", "value", "parts", "keep", "drop", "members", "none"}
        with pytest.raises(InputError, match="kind 'msak' is not known"):
            Key.parse("model.layers.0.weight:msak")

    def test_asking_for_a_key_decodes_nothing(self, folder: Path, tmp_path: Path) -> None:
        writer = PlanWriter(tmp_path / "plan", Origin("by hand", {}, "0", "0"))
        writer.write({Key("x", "mask"): torch.ones(64, dtype=torch.bool)}, {})
        writer.finish({})
        plan = Plan.load(tmp_path / "plan")
        (tmp_path / "plan" / "block-0000.safetensors").unlink()
        assert Key("x", "mask") in plan
        assert Key("x", "value") not in plan
        assert plan.shapes[Key("x", "mask")] == (64,)


def test_a_plan_of_the_former_format_is_refused_by_name(tmp_path: Path) -> None:
    writer = PlanWriter(tmp_path, Origin("by hand", {}, "0", "0"))
    writer.finish({})
    head = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(head | {"format": 1}))
    with pytest.raises(InputError, match="a plan of format 1, this structprune reads format 2"):
        Plan.load(tmp_path)


def test_a_plan_whose_promises_or_patch_were_changed_is_refused(tmp_path: Path) -> None:
    writer = PlanWriter(tmp_path, Origin("by hand", {}, "0", "0"))
    writer.finish({}, patch={"attention_bias": False})
    head = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(head | {"patch": {"attention_bias": True}}))
    with pytest.raises(InputError, match="does not match"):
        Plan.load(tmp_path)
