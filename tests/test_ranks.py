"""Several processes that share a run: what they add up, and that all decide what one alone would."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from structprune.calibration.statistics import input_parts
from structprune.models.rank_batches import RankBatches
from structprune.plan.plan import Plan
from structprune.pruners.blockwise import BlockwisePruner
from structprune.ranks import Ranks
from tests.methods import STORED_METHODS, home, quick
from tests.ranked import WORKERS

ROOT = Path(__file__).parents[1]


def sums_in_float32(method: str) -> bool:
    """Tell whether a method reads sums whose order shows: Gram matrices or gradients."""
    pruner = quick(method)
    assert isinstance(pruner, BlockwisePruner)
    parts = pruner.solving | pruner.measuring
    return "gram" in parts or parts != input_parts(parts) or pruner.solves_passes


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[int, int], Any]]:
    """Let three processes decide together, then two, then one; return the folder and what each said."""
    folder = tmp_path_factory.mktemp("ranks")
    for family in {home(method).family for method in STORED_METHODS}:
        home(next(one for one in STORED_METHODS if home(one).family == family)).save(folder / family)
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranked", str(folder / "meeting"), str(rank), str(folder)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORKERS)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=600)
        assert worker.returncode == 0, errors
    said = {
        (count, rank): json.loads((folder / f"{count}-{rank}.json").read_text())
        for count in range(1, WORKERS + 1)
        for rank in range(count)
    }
    return folder, said


class TestAGroup:
    @pytest.mark.parametrize("method", STORED_METHODS)
    def test_all_of_a_group_decide_alike_streamed_and_resident(self, decided: Any, method: str) -> None:
        _, said = decided
        for (count, _), found in said.items():
            assert found[method]["resident"] == found[method]["streamed"]
            assert found[method] == said[count, 0][method]

    @pytest.mark.parametrize("method", [one for one in STORED_METHODS if not sums_in_float32(one)])
    def test_what_only_ranks_decides_alike_in_groups_of_any_size(self, decided: Any, method: str) -> None:
        _, said = decided
        assert said[1, 0][method] == said[2, 0][method] == said[3, 0][method]

    @pytest.mark.parametrize("method", [one for one in STORED_METHODS if sums_in_float32(one)])
    def test_the_order_of_float32_sums_hardly_shows(self, decided: Any, method: str) -> None:
        folder, _ = decided
        alone, *others = (Plan.load(folder / f"{count}-{method}") for count in range(1, WORKERS + 1))
        for other in others:
            same = {"mask": [0, 0], "keep": [0, 0]}
            for key in alone:
                one, two = alone[key], other[key]
                if key.edit in same:
                    same[key.edit][0] += int((one == two).sum())
                    same[key.edit][1] += one.numel()
                elif key.kind == "value":
                    # A mask that turns over moves the rest of its row.
                    assert float((one.float() - two.float()).norm()) < 0.2 * float(one.float().norm())
            for equal, of in same.values():
                assert equal >= 0.99 * of


class TestDivision:
    @pytest.mark.parametrize("batches", [1, 2, 5, 8, 9, 20])
    def test_every_batch_is_run_by_one_process_in_chunks_that_do_not_depend_on_them(
        self, batches: int
    ) -> None:
        every = [{"input_ids": torch.tensor([[number]])} for number in range(batches)]
        alone = RankBatches(every)
        chunks = {number: alone.chunk(number) for number in range(batches)}
        assert alone.chunks == min(8, batches) == len({*chunks.values()})
        for count in range(1, min(batches, 8) + 1):
            shares = [RankBatches(every, Ranks(number, count)) for number in range(count)]
            run = [int(batch["input_ids"]) for share in shares for batch in share]
            assert run == [*range(batches)]
            assert all(len(share) for share in shares)
            for share in shares:
                for position in range(len(share)):
                    assert share.chunk(position) == chunks[share.number(position)]

    def test_more_processes_than_chunks_have_a_chunk_each(self) -> None:
        every = [{"input_ids": torch.zeros(1, 1)} for _ in range(30)]
        shares = [RankBatches(every, Ranks(number, 12)) for number in range(12)]
        assert shares[0].chunks == 12
        assert sum(map(len, shares)) == 30
        assert min(map(len, shares)) >= 2

    def test_jobs_go_to_whoever_has_least_to_do(self) -> None:
        assert Ranks(0, 2).divide([1, 5, 3, 2]) == [1, 0, 1, 1]
        assert Ranks(0, 1).divide([1, 5]) == [0, 0]


class TestAlone:
    def test_what_is_said_is_heard(self) -> None:
        tensors = {"a": torch.ones(2)}
        assert Ranks().tell_each({"x": 1}, tensors) == [({"x": 1}, tensors)]
        values = torch.tensor([1.0, 2.0])
        Ranks().add_in_order(values)
        Ranks().add_apart(values)
        assert values.tolist() == [1.0, 2.0]
        assert Ranks.here() == Ranks()
