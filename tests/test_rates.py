"""Rates of this machine: how they are measured, where they are kept, and which hold for a run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import structprune
from structprune.cli import main
from structprune.errors import UsageError
from structprune.evaluation import machine_rates
from structprune.evaluation.rates import Rates, Site, choose_rates, rates_file, read_rates, save_rates
from structprune.models.opening import Opening
from structprune.pipeline.estimate import seconds_of
from structprune.pruners.demand import Demand
from structprune.recipe.recipe import Recipe
from structprune.solvers.effort import Effort
from tests.methods import CALIBRATION
from tests.tiny import save_tiny

HERE = Site("a processor", "cpu", 1, 1, "2.13")
RATES = Rates(HERE, {"float32": 100.0, "bfloat16": 200.0}, 50.0, 20.0, 10.0, 5.0, None)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the figures of the user out of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "structprune" / "rates.json"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_rates, "SECONDS", 0.001)
    monkeypatch.setattr(machine_rates, "WIDTH", 32)
    monkeypatch.setattr(machine_rates, "READ_BYTES", 2 << 20)
    monkeypatch.setattr(machine_rates, "MOVED_BYTES", 2 << 20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model")
    return tmp_path / "model"


def dry_run(folder: Path, **more: Any) -> dict[str, Any]:
    stage = {"method": more.pop("method", "sparsegpt"), "sparsity": 0.5}
    raw = {"model": str(folder), "output": str(folder.parent / "out"), "prune": stage}
    asked = Recipe.model_validate(
        raw | {"calibration": CALIBRATION | {"batch_size": 2}} | more.pop("raw", {})
    )
    return structprune.dry_run(asked, opening=Opening(stream=True), **more)


def test_every_part_takes_its_amount_over_its_rate() -> None:
    demand = Demand(40.0, 1000.0, 300.0, 20.0, 150.0, 100.0, Effort(50.0, 10.0), 900.0, 700.0)
    assert seconds_of(demand, RATES, "bfloat16") == {
        "read": 2.0,
        "forward": 5.0 + 3.0,
        "statistics": 3.0 + 2.0 + 2.0,
        "solve": 0.5 + 2.0,
    }
    assert seconds_of(demand, replace(RATES, sent_bytes=7.0), "float32")["reduce"] == 100.0


def test_figures_are_kept_by_their_place(cache: Path) -> None:
    assert rates_file() == cache
    assert read_rates(cache) == []
    save_rates(RATES, cache)
    save_rates(replace(RATES, place=replace(HERE, threads=2)), cache)
    save_rates(replace(RATES, ranked=6.0), cache)
    assert [(one.place.threads, one.ranked) for one in read_rates(cache)] == [(2, 5.0), (1, 6.0)]


def test_a_relative_cache_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rates_file() == tmp_path / ".cache" / "structprune" / "rates.json"


@pytest.mark.parametrize("content", ["{", "{}", "[1]", '[{"place": {}}]', "zero"])
def test_a_file_that_is_none_of_ours_is_passed_over_with_a_word(
    cache: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    save_rates(RATES, cache)
    text = cache.read_text()
    cache.write_text(text.replace("5.0", "0.0") if content == "zero" else content)
    assert read_rates(cache) == []
    assert str(cache) in caplog.text


def test_figures_of_another_place_are_named_and_not_used() -> None:
    chosen, word = choose_rates([RATES], replace(HERE, processor="another", threads=4))
    assert chosen is None
    assert word == "those kept are of processor a processor, not another; threads 1, not 4"


def test_figures_of_fewer_processes_serve_with_a_word() -> None:
    sending = replace(RATES, sent_bytes=1.0)
    two, eight = (replace(sending, place=replace(HERE, ranks=count)) for count in (2, 8))
    assert choose_rates([RATES, two, eight], replace(HERE, ranks=2)) == (two, "")
    assert choose_rates([RATES, two, eight], replace(HERE, ranks=4)) == (two, "measured by 2 of 4 processes")
    assert choose_rates([RATES], replace(HERE, ranks=2))[1].endswith("without what they send each other")
    assert choose_rates([two], HERE)[0] is None


@pytest.mark.usefixtures("quick")
def test_measuring_keeps_what_the_dry_run_then_uses(folder: Path, cache: Path) -> None:
    without = dry_run(folder, ranks=1)["ranks"]
    assert without["seconds"] is None and without["stages"][0]["seconds"] is None
    assert "`structprune bench --rates`" in without["time"]
    found = structprune.bench_rates(str(folder))
    assert found["file"] == str(cache)
    assert found["rates"]["sent_bytes"] is None
    assert min(found["rates"]["flops"].values()) > 0
    said = dry_run(folder, ranks=1)["ranks"]
    (stage,) = said["stages"]
    assert said["seconds"] == pytest.approx(
        sum(stage["seconds"].values()) + said["check_bytes"] / found["rates"]["read_bytes"], rel=0.02
    )


@pytest.mark.usefixtures("quick")
def test_the_time_of_a_training_grows_with_its_steps(folder: Path) -> None:
    def seconds(steps: int) -> float | None:
        training = {"recover": {"data": "demo", "length": 24, "steps": steps}}
        return dry_run(folder, raw=training)["recover"]["seconds"]

    assert seconds(50) is None
    structprune.bench_rates(str(folder))
    short, long = seconds(50), seconds(500)
    assert short and long and long == pytest.approx(10 * short, rel=0.1)


def test_a_dry_run_says_what_each_of_several_processes_takes(folder: Path) -> None:
    plain = dry_run(folder)
    assert "ranks" not in plain
    one, two, three = (dry_run(folder, ranks=count)["ranks"] for count in (1, 2, 3))
    assert [said["count"] for said in (one, two, three)] == [1, 2, 3]
    assert one["memory_bytes"] == plain["memory_bytes"] >= two["memory_bytes"] >= three["memory_bytes"]
    # The weights are checked by all together, and walked over by each.
    assert one["check_bytes"] == pytest.approx(2 * two["check_bytes"], abs=2)
    assert one["stages"][0]["read_bytes"] == two["stages"][0]["read_bytes"] > 0
    reduced = [said["stages"][0]["reduced_bytes"] for said in (one, two, three)]
    assert 0 == reduced[0] < reduced[1] < reduced[2] <= 2 * reduced[1]
    assert two["stages"][0]["reduced_per_block_bytes"] == reduced[1] // 2
    assert "torchrun --nproc-per-node 2 -m structprune bench --rates" in two["time"]


def test_figures_of_another_machine_give_no_time(folder: Path, cache: Path) -> None:
    save_rates(RATES, cache)
    said = dry_run(folder, ranks=2)["ranks"]
    assert said["seconds"] is None
    assert said["time"].startswith("those kept are of processor a processor, not ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"ranks": 0}, "--ranks 0: expected at least 1"),
        ({"ranks": -2}, "--ranks -2: expected at least 1"),
        ({"ranks": 4}, "4 processes for 3 batches: each needs one"),
        ({"ranks": 2, "goals": [0.3, 0.5]}, "several goals are one process's work"),
        ({"ranks": 2, "raw": {"recover": {"steps": 1}}}, "recover: trains in a launch of its own"),
    ],
)
def test_what_no_launch_could_do_is_refused(folder: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as found:
        dry_run(folder, **more)
    assert message in str(found.value)


def test_a_method_without_data_is_shared_by_any_number(folder: Path) -> None:
    said = dry_run(folder, method="magnitude", ranks=50)["ranks"]
    assert said["stages"][0]["reduced_bytes"] > 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["bench"], "MODEL is missing"),
        (["bench", "--rates", "--length", "8"], "--rates measures the machine"),
        (["bench", "nowhere", "--rates"], "nowhere"),
        (["prune", "demo", "OUT", "--method", "wanda", "--ranks", "2"], "--ranks 2: only --dry-run reads it"),
    ],
)
def test_bad_lines_are_refused(line: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*line, "--json"]) in (2, 3)
    error = json.loads(capsys.readouterr().out)["error"]
    assert message in error["message"]


@pytest.mark.usefixtures("quick")
def test_the_command_prints_its_rates(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    assert main(["bench", "--rates"]) == 0
    said = "".join(capsys.readouterr().out.split())  # A long path is wrapped.
    assert "products,float32" in said and "GFLOP/s" in said and str(cache) in said
    assert len(read_rates(cache)) == 1
    assert read_rates(cache)[0].place == Site.here()
    assert torch.get_num_threads() == read_rates(cache)[0].place.threads
