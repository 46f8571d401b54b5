"""What a run is said to take before it runs, beside what it takes."""

from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from structprune.models.arch import all_linears
from structprune.models.cost import body_flops, stored_bytes
from structprune.models.opening import Opening
from structprune.models.streamed import open_model, open_skeleton
from structprune.pruners.catalogue import find
from structprune.pruners.demand import Sharing, distinct_inputs
from structprune.solvers.effort import effort_of_updating
from tests.counted import BATCH, DEPTH, FAMILY, LENGTH, SAMPLES, WORKERS, counted_batches
from tests.tiny import FAMILIES, save_tiny, tiny

SHARING = Sharing(SAMPLES, LENGTH, BATCH, streamed=True)
SHARED = Sharing(SAMPLES, LENGTH, BATCH, WORKERS, streamed=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("demand")
    save_tiny(FAMILY, place / "model", depth=DEPTH)
    return place


def test_the_busiest_of_two_has_three_of_five_batches() -> None:
    assert SHARING.sizes == [2, 2, 2, 2, 1]
    assert SHARING.tokens == 9 * 24
    assert SHARED.tokens == 6 * 24
    assert Sharing(9, 24, 2, 5).tokens == 2 * 24


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2"])
def test_every_byte_of_the_files_is_in_one_place(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    model = open_skeleton(tmp_path)
    found = stored_bytes(model)
    assert found.all == sum(info.nbytes for info in model.reader.tensors.values())
    assert len(found.blocks) == 2 and min(found.blocks) > 0
    assert bool(found.head) == ("lm_head.weight" in model.reader.tensors)
    # A twin, or a model that was never in files, would be stored alike.
    assert stored_bytes(tiny(family)) == found


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "gpt2", "opt", "phi3", "mixtral"])
def test_linears_that_share_an_input_are_found_by_their_places(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    model = open_model(tmp_path)
    pruner = find("sparsegpt").model_validate({"sparsity": 0.5})
    seen: list[set[frozenset[str]]] = []

    def note(matrices: Any, sums: Any) -> Any:
        seen[-1].add(frozenset(one.label for one in matrices))
        return solve(matrices, sums)

    solve = pruner.solve
    object.__setattr__(pruner, "solve", note)
    said = []
    for found in all_linears(model):
        said.append({frozenset(one.label for one in group) for group in distinct_inputs(found)})
    seen.append(set())
    pruner.calibrate(model, counted_batches())
    assert seen[0] == set.union(*said)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "nowag", "cfsp", "block_drop", "magnitude"])
def test_reading_and_operations_are_those_of_the_run(
    folder: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(folder / "model", Opening(stream=True))
    model.skeleton.set_attn_implementation("eager")  # type: ignore[union-attr]  # fused ones are not counted
    reader = type(model.reader)  # type: ignore[union-attr]
    read, nbytes = reader.read, []
    monkeypatch.setattr(
        reader, "read", lambda self, name: nbytes.append(self.tensors[name].nbytes) or read(self, name)
    )
    pruner = find(method).model_validate({"sparsity": 0.5})
    with FlopCounterMode(display=False) as counter:
        pruner.calibrate(model, counted_batches(), pruner.writer(None, model, "weights"))
    said = pruner.demand(model, SHARING)
    assert said is not None
    assert counter.get_total_flops() == said.forward + said.products
    assert sum(nbytes) == said.read_bytes
    assert said.sent_bytes == 0
    resident = pruner.demand(model, Sharing(SAMPLES, LENGTH, BATCH))
    assert resident is not None and resident.read_bytes == 0


def test_the_work_of_one_matrix_by_hand() -> None:
    # Wanda on the tiny Llama: 2 blocks, hidden 64, 32 key-value features, 96 channels.
    model = tiny(FAMILY, depth=DEPTH)
    wanda = find("wanda").model_validate({"sparsity": 0.5}).demand(model, SHARED)
    assert wanda is not None
    tokens, weights = 6 * 24, 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    # Distinct inputs: of q, k, v; of o; of gate and up; of down.
    features = 64 + 64 + 64 + 96
    assert wanda.squares == 2 * tokens * features
    # Five chunks of one batch; a count and a float64 for each feature, added up; masks of a byte a weight.
    assert wanda.sent_bytes == 2 * (2 * 8 * 5 * (features + 4) + weights)
    # By weights times inputs one process has gate, up and o, the other down, q, k and v.
    assert wanda.solving.ranked == 2 * max(2 * 64 * 96 + 64 * 64, 64 * 96 + 64 * 128)
    flops = body_flops(model, LENGTH)
    assert flops is not None
    spared = 2 * 2 * 64 * 96 * (6 - 2) * 24
    assert wanda.forward == pytest.approx(1.5 * flops * tokens - spared)


def test_the_effort_of_an_update_grows_as_its_paper_says() -> None:
    assert effort_of_updating(0, 8).products == pytest.approx(4 / 3 * 512)
    assert effort_of_updating(3, 8).products == pytest.approx(4 / 3 * 512 + 3 * 64)
    assert effort_of_updating(3, 8).told_bytes == 4 * 24


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_forward_can_be_counted_in_every_family(family: str) -> None:
    flops = body_flops(tiny(family), LENGTH)
    assert flops is not None and flops > 0
