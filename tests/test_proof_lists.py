"""Numbered lists of which a plan leaves some members: whatever the files hold instead is noticed.

The folders are written by hand, by none of the code that prunes; a lie is a difference between two arguments.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from structprune.checkpoint.manifest import write_manifest
from structprune.checkpoint.modelling import patched_files
from structprune.checkpoint.side_files import copy_side_files
from structprune.plan.key import Key
from structprune.plan.origin import Architecture, Origin
from structprune.plan.plan import PlanWriter
from structprune.plan.promise import Listed, Promises, Removed
from structprune.proof.verification import Verification
from structprune.proof.verify import verify
from structprune.storage.reader import CheckpointReader
from structprune.storage.tensor_file import save_tensors
from tests.by_hand import every_second, linear_names
from tests.tiny import save_tiny

LIST = "model.layers"
DEPTH = 5
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Drop:
    """What a plan says: which blocks of how many stay; what it promises is the same unless given."""

    kept: Sequence[int]
    of: int = DEPTH
    promised: Sequence[Listed] | None = None
    lost: int | None = None

    def promises(self, shapes: dict[str, tuple[int, ...]]) -> Promises:
        lost = sum(prod(shape) for name, shape in shapes.items() if _block(name) not in (None, *self.kept))
        true = (Listed(name=LIST, stay=len(self.kept), of=self.of),)
        stored = true if self.promised is None else tuple(self.promised)
        removed = lost if self.lost is None else self.lost
        return Promises(unit="parameters", asked=0.2, removed=removed, of=10**6, stored=stored)


@dataclass(frozen=True)
class Mask:
    """A plan that removes every second input of every linear."""

    change: Callable[[Tensors], object] = field(default=lambda masks: None)


def _block(name: str) -> int | None:
    """Return the number of the block to which a stored tensor belongs; blocks are all that can be dropped."""
    rest = name.removeprefix(f"{LIST}.")
    return int(rest.partition(".")[0]) if rest != name else None


def renumbered(tensors: Tensors, kept: Sequence[int | None]) -> Tensors:
    """Return the tensors of some blocks, numbered by their place; a None leaves a number out."""
    found = {name: tensor for name, tensor in tensors.items() if _block(name) is None}
    for new, old in enumerate(kept):
        for name in (name for name in tensors if old is not None and _block(name) == old):
            found[f"{LIST}.{new}.{name.split('.', 3)[3]}"] = tensors[name]
    return found


@dataclass
class Folder:
    """A folder that went through stages.

    Attributes:
        source: The model that did.
        path: Where it is written.
        stages: What its plans say.
        holds: The source's blocks that the files hold, in order.
    """

    source: Path
    path: Path
    stages: Sequence[Drop | Mask]
    holds: Sequence[int | None]
    edit: Callable[[Tensors], object] = lambda tensors: None
    knows_source: bool = True

    def verified(self) -> Verification:
        """Write the folder and verify it, against its source where that is known."""
        self.path.mkdir()
        reader = CheckpointReader(self.source)
        tensors = {name: reader.read(name) for name in reader.tensors}
        left, depth = dict(tensors), DEPTH
        copy_side_files(self.source, self.path)
        for number, stage in enumerate(self.stages, 1):
            left = self._plan(number, stage, left)
            depth = len(stage.kept) if isinstance(stage, Drop) else depth
        if any(isinstance(stage, Mask) for stage in self.stages):
            for name in linear_names(self.source):
                tensors[name] = tensors[name].masked_fill(~every_second(tuple(tensors[name].shape)), 0)
        tensors = renumbered(tensors, self.holds)
        self.edit(tensors)
        save_tensors(
            self.path / "model.safetensors", {n: t.clone() for n, t in tensors.items()}, {"format": "pt"}
        )
        config = patched_files(self.source / "config.json", {"num_hidden_layers": len(self.holds)})
        (self.path / "config.json").write_bytes(config["config.json"])
        write_manifest(self.path, {}, version="0", stages=[])
        return verify(self.path, self.source if self.knows_source else None, reload=False)

    def _plan(self, number: int, stage: Drop | Mask, before: Tensors) -> Tensors:
        shapes = {name: tuple(tensor.shape) for name, tensor in before.items()}
        found = Architecture(model_type="llama", shapes=shapes)
        origin = Origin("magnitude", {}, found.hash, "0" * 64, found)
        writer = PlanWriter(self.path / f"structprune/plans/{number:02}-stage", origin)
        if isinstance(stage, Drop):
            writer.write({Key(LIST, "members"): torch.tensor(stage.kept)}, {})
            patch = {"num_hidden_layers": len(stage.kept)}
            writer.finish({}, promises=stage.promises(shapes), patch=patch)
            return renumbered(before, stage.kept)
        names = [name for name in linear_names(self.source) if name in before]
        masks = {name: every_second(shapes[name]) for name in names}
        removed = sum(int((~mask).sum()) for mask in masks.values())
        stored = tuple(
            Removed(tensors=(name,), per="row", removed=mask.shape[1] // 2) for name, mask in masks.items()
        )
        promises = Promises(unit="weights", asked=0.5, removed=removed, of=2 * removed, stored=stored)
        stage.change(masks)
        writer.write({Key(name, "mask"): mask for name, mask in masks.items()}, {})
        writer.finish({}, promises=promises)
        return before


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("source") / "llama", depth=DEPTH)


def told(found: Verification) -> dict[str, str]:
    """Return the checks that failed, and what they say."""
    return {row.name: row.detail for row in found.failed}


ONE = [Drop([0, 2, 3, 4])]
# Of five blocks 1 leaves, then what was called 3 and is called 2.
TWO = [Drop([0, 2, 3, 4]), Drop([0, 1, 3], of=4)]
WAYS = {
    "one": (ONE, [0, 2, 3, 4]),
    "two": (TWO, [0, 2, 4]),
    "mask first": ([Mask(), *TWO], [0, 2, 4]),
    "mask last": ([*TWO, Mask()], [0, 2, 4]),
    "mask between": ([ONE[0], Mask(), TWO[1]], [0, 2, 4]),
}
AFTER_TWO = pytest.mark.parametrize("way", WAYS)


@AFTER_TWO
def test_a_faithful_folder_passes(way: str, source: Path, tmp_path: Path) -> None:
    stages, holds = WAYS[way]
    found = Folder(source, tmp_path / "out", stages, holds).verified()
    assert told(found) == {}
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == len(holds)


@AFTER_TWO
def test_what_left_is_counted_without_the_source(way: str, source: Path, tmp_path: Path) -> None:
    stages, holds = WAYS[way]
    found = Folder(source, tmp_path / "out", stages, holds, knows_source=False).verified()
    assert told(found) == {}
    shares = [30848 / 10**6 if isinstance(stage, Drop) else 0.5 for stage in stages]
    assert [*found.stages.values()] == shares


@pytest.mark.parametrize("number", [1, 2])
def test_a_plan_that_says_it_found_other_shapes_is_refused(number: int, source: Path, tmp_path: Path) -> None:
    folder = Folder(source, tmp_path / "out", TWO, [0, 2, 4], knows_source=False)
    folder.verified()
    path = tmp_path / f"out/structprune/plans/0{number}-stage/plan.json"
    plan = json.loads(path.read_text())
    plan["before"]["shapes"]["model.norm.weight"] = [65]
    path.write_text(json.dumps(plan))
    found = verify(tmp_path / "out", reload=False)
    assert "before: not the architecture that it names" in told(found)["files"]


@pytest.mark.parametrize(
    ("number", "where", "said"),
    [(1, "02-stage: before it, ", "[65, 64], [96, 64]"), (2, "02-stage: before it, ", "[96, 64], [65, 64]")],
)
def test_plans_of_another_model_are_noticed_without_the_source(
    number: int, where: str, said: str, source: Path, tmp_path: Path
) -> None:
    gone = f"{LIST}.0.mlp.up_proj.weight"

    class Other(Folder):
        def _plan(self, at: int, stage: Drop | Mask, before: Tensors) -> Tensors:
            super()._plan(at, stage, before | ({gone: torch.zeros(65, 64)} if at == number else {}))
            return renumbered(before, stage.kept) if isinstance(stage, Drop) else before

    found = Other(source, tmp_path / "out", TWO, [0, 2, 4], knows_source=False).verified()
    assert f"{where}{gone}: shape {said} by the plans" in told(found)["plans"]


@AFTER_TWO
def test_a_value_that_changed_in_a_renumbered_block_is_told_by_its_name_in_the_files(
    way: str, source: Path, tmp_path: Path
) -> None:
    stages, holds = WAYS[way]
    name = f"{LIST}.{len(holds) - 1}.mlp.up_proj.weight"

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][3, 4] += 1  # an even input: no mask removes it

    found = Folder(source, tmp_path / "out", stages, holds, change).verified()
    assert told(found) == {"source": f"{name}: 1 kept weights differ from the source"}


@AFTER_TWO
@pytest.mark.parametrize("other", [1, 3])
def test_another_block_in_the_place_of_the_last_is_noticed(
    way: str, other: int, source: Path, tmp_path: Path
) -> None:
    stages, holds = WAYS[way]
    found = Folder(source, tmp_path / "out", stages, [*holds[:-1], other]).verified()
    assert told(found).keys() == {"source"}
    assert told(found)["source"].startswith(f"{LIST}.{len(holds) - 1}.")


@AFTER_TWO
def test_two_blocks_that_changed_places_are_noticed(way: str, source: Path, tmp_path: Path) -> None:
    stages, holds = WAYS[way]
    found = Folder(source, tmp_path / "out", stages, [*holds[:-2], *reversed(holds[-2:])]).verified()
    assert told(found).keys() == {"source"}


@AFTER_TWO
def test_more_blocks_in_the_files_than_the_plan_leaves(way: str, source: Path, tmp_path: Path) -> None:
    stages, holds = WAYS[way]
    found = Folder(source, tmp_path / "out", stages, [*holds, 1]).verified()
    plans = told(found)["plans"]
    assert f"{LIST}: {len(holds) + 1} members in the files, {len(holds)} were promised" in plans


@AFTER_TWO
def test_a_block_that_is_missing_in_the_middle(way: str, source: Path, tmp_path: Path) -> None:
    stages, holds = WAYS[way]
    found = Folder(source, tmp_path / "out", stages, [holds[0], None, *holds[2:]]).verified()
    assert "(in one but not the other: 1)" in told(found)["files"]


def test_one_block_too_few_under_a_configuration_that_knows_of_it(source: Path, tmp_path: Path) -> None:
    found = Folder(source, tmp_path / "out", TWO, [0, 2]).verified()
    assert f"{LIST}: 2 members in the files, 3 were promised" in told(found)["plans"]


def test_a_tensor_of_a_block_that_is_missing(source: Path, tmp_path: Path) -> None:
    gone = f"{LIST}.1.mlp.up_proj.weight"
    found = Folder(source, tmp_path / "out", TWO, [0, 2, 4], lambda tensors: tensors.pop(gone)).verified()
    assert gone in told(found)["files"]


class TestAPlanThatLies:
    @pytest.mark.parametrize("later", [[], [TWO[1]]], ids=["last", "cut again"])
    def test_it_says_fewer_members_than_it_promises(
        self, later: list[Drop], source: Path, tmp_path: Path
    ) -> None:
        stages = [Drop([0, 2, 3, 4], promised=[Listed(name=LIST, stay=3, of=5)]), *later]
        holds = [0, 2, 4] if later else [0, 2, 3, 4]
        found = Folder(source, tmp_path / "out", stages, holds).verified()
        assert "4 members stay, 3 of 5 were promised" in told(found)["plans"]

    @pytest.mark.parametrize("number", [0, 1])
    def test_it_cuts_a_list_that_it_does_not_promise(self, number: int, source: Path, tmp_path: Path) -> None:
        stages = [Drop(one.kept, one.of, []) if at == number else one for at, one in enumerate(TWO)]
        found = Folder(source, tmp_path / "out", stages, [0, 2, 4]).verified()
        assert f"0{number + 1}-stage: {LIST}: is cut, but not promised" in told(found)["plans"]

    def test_it_promises_a_list_that_it_does_not_cut(self, source: Path, tmp_path: Path) -> None:
        experts = Listed(name="model.experts", stay=4, of=5)
        stages = [Drop([0, 2, 3, 4], promised=[experts, Listed(name=LIST, stay=4, of=5)])]
        found = Folder(source, tmp_path / "out", stages, [0, 2, 3, 4]).verified()
        assert "model.experts: 0 members stay, 4 of 5 were promised" in told(found)["plans"]

    @pytest.mark.parametrize("kept", [[0, 2, 3, 5], [0, 2, 2, 3], [2, 0, 3, 4]], ids=str)
    def test_its_members_are_none_of_the_list_or_out_of_order(
        self, kept: list[int], source: Path, tmp_path: Path
    ) -> None:
        found = Folder(source, tmp_path / "out", [Drop(kept)], [0, 2, 3, 4]).verified()
        assert f"{LIST}: members {kept} stay, not ascending numbers below 5" in told(found)["plans"]

    @pytest.mark.parametrize("number", [0, 1])
    def test_it_promises_that_fewer_parameters_leave(self, number: int, source: Path, tmp_path: Path) -> None:
        stages = [Drop(one.kept, one.of, lost=1) if at == number else one for at, one in enumerate(TWO)]
        found = Folder(source, tmp_path / "out", stages, [0, 2, 4]).verified()
        assert f"0{number + 1}-stage: 30848 of 1000000 parameters removed, expected 1" in told(found)["count"]


@pytest.mark.parametrize("block", [1, 3, 4])
def test_an_earlier_mask_is_counted_also_in_a_block_that_left(
    block: int, source: Path, tmp_path: Path
) -> None:
    def keep_one_more(masks: Tensors) -> None:
        masks[f"{LIST}.{block}.self_attn.q_proj.weight"][7, 1] = True

    stages = [Mask(keep_one_more), *TWO]
    found = Folder(source, tmp_path / "out", stages, [0, 2, 4]).verified()
    left = {
        1: "1.self_attn.q_proj.weight (left with 02-stage)",
        3: "2.self_attn.q_proj.weight (left with 03-stage)",
    }
    called = f"{LIST}.{left.get(block, '2.self_attn.q_proj.weight')}"
    assert f"01-stage: {called}: 31 weights removed from row 7, expected 32" in told(found)["count"]


def test_a_weight_revived_in_a_renumbered_block(source: Path, tmp_path: Path) -> None:
    name = f"{LIST}.2.self_attn.q_proj.weight"

    def revive(tensors: Tensors) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][3, 5] = 0.25

    found = Folder(source, tmp_path / "out", [Mask(), *TWO], [0, 2, 4], revive).verified()
    assert told(found)["masks"] == f"{name}: 1 removed weights are not zero"
