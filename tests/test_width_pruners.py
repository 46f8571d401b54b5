"""Methods of width: which units leave, how many, what makes up for them, what is refused."""

import json
import signal
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import structprune
from structprune.errors import Interrupted, UsageError
from structprune.models.arch import arch_of, blocks
from structprune.models.groups import BlockKeep, block_sizes
from structprune.models.masking import masked
from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.plan.plan import Plan
from structprune.pruners.catalogue import find
from structprune.pruners.forecast import forecast_all
from tests.conftest import Command
from tests.methods import QUICK, short_runs
from tests.test_flap import padded, reads
from tests.tiny import FAMILIES, save_tiny, tiny, tokens

# Parameters of a unit of a tiny Llama: 2 x 16 rows of q and columns of o, 16 of k and v, all of 64; 3 x 64.
GROUP, CHANNEL = 64 * 16 * (2 + 2 + 1 + 1), 3 * 64
WHOLE = 2 * (2 * GROUP + 96 * CHANNEL)
METHODS = ["flap", "wanda_sp", "magnitude_units", "random_units"]


def decided(method: str, family: str = "llama", **fields: Any) -> Plan:
    model = tiny(family)
    return find(method)(**fields).calibrate(model, [tokens(model, seed=seed) for seed in range(2)])


def kept(plan: Plan) -> list[tuple[int, int]]:
    return [(one["kv_groups"], one["channels"]) for one in plan.facts["kept"]]


class TestHowMuchLeaves:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.4, 0.7])
    def test_uniform_every_block_is_within_half_a_channel(self, method: str, sparsity: float) -> None:
        plan = decided(method, budget="uniform", sparsity=sparsity)
        for groups, channels in kept(plan):
            left = groups * GROUP + channels * CHANNEL
            assert abs(left - (1 - sparsity) * WHOLE / 2) <= CHANNEL / 2

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.4, 0.8])
    def test_global_the_model_is_within_half_its_largest_unit(self, method: str, sparsity: float) -> None:
        plan = decided(method, budget="global", sparsity=sparsity)
        left = sum(groups * GROUP + channels * CHANNEL for groups, channels in kept(plan))
        assert plan.promises is not None
        assert plan.promises.removed == WHOLE - left
        assert abs(left - (1 - sparsity) * WHOLE) <= GROUP / 2
        assert all(groups >= 1 and channels >= 1 for groups, channels in kept(plan))

    def test_global_blocks_that_matter_more_lose_less(self) -> None:
        model = tiny("llama")
        with torch.no_grad():
            blocks(model)[1][1].mlp.down_proj.weight *= 10
        plan = find("magnitude_units")(budget="global", units=["channel"], sparsity=0.4).calibrate(model, [])
        assert kept(plan) == [(2, 19), (2, 96)]

    @pytest.mark.parametrize("budget", ["uniform", "global", "sigmoid"])
    def test_a_multiple_stays_of_every_kind(self, budget: str) -> None:
        fields: dict[str, Any] = {"budget": budget, "multiple": 16, "kv_multiple": 2}
        plan = decided("wanda_sp", "opt", sparsity=0.4, **fields)
        assert all(groups % 2 == channels % 16 == 0 for groups, channels in kept(plan))
        assert any(pair != (4, 96) for pair in kept(plan))

    def test_a_multiple_never_makes_a_model_bigger(self) -> None:
        """96 is no multiple of 64: as many stay, or 64 do; 96 is less than 128, and stays."""
        assert kept(decided("wanda_sp", units=["channel"], sparsity=0.2, multiple=64)) == [(2, 64)] * 2
        assert kept(decided("wanda_sp", sparsity=0.4, multiple=128)) == [(1, 96)] * 2
        assert kept(decided("wanda_sp", units=["channel"], sparsity=0.3, budget="global", multiple=64)) in (
            [(2, 64), (2, 64)],
            [(2, 96), (2, 64)],
            [(2, 64), (2, 96)],
        )

    def test_almost_all_heads_asked_away_leave_one_group(self) -> None:
        assert kept(decided("wanda_sp", units=["kv_group"], sparsity=0.6)) == [(1, 96)] * 2
        with pytest.raises(UsageError, match="rounds to nothing"):  # one group of one is not to be taken
            find("wanda_sp")(units=["kv_group"], sparsity=0.9, kv_multiple=2).calibrate(tiny("llama"), [])


class TestWhichLeave:
    def test_a_group_is_scored_by_its_own_heads(self) -> None:
        """Head a belongs to group a // (heads / groups): those of the second group are large here."""
        model = tiny("llama")
        for _, block in blocks(model):
            with torch.no_grad():
                block.self_attn.o_proj.weight[:, 32:] *= 3
        plan = find("wanda_sp")(units=["kv_group"], sparsity=0.5).calibrate(model, [tokens(model)])
        rows = [plan[key] for key in plan if "k_proj" in key.name]
        queries = [plan[key] for key in plan if "q_proj" in key.name]
        assert [row.tolist() for row in rows] == [list(range(16, 32))] * 2
        assert [row.tolist() for row in queries] == [list(range(32, 64))] * 2

    def test_wanda_sp_by_hand(self) -> None:
        model, data = tiny("llama"), padded(tiny("llama"))
        plan = find("wanda_sp")(units=["channel"], sparsity=0.5).calibrate(model, data)
        for prefix, block in blocks(model):
            norm = reads(model, f"{prefix}.mlp.down_proj", data).square().sum(dim=0).sqrt()
            scores = block.mlp.down_proj.weight.detach().double().abs().mean(dim=0) * norm
            (found,) = (plan[key] for key in plan if key.name.startswith(f"{prefix}.mlp.down_proj"))
            assert found.tolist() == scores.argsort(descending=True)[:48].sort().values.tolist()

    def test_chance_follows_its_seed(self) -> None:
        one, same, other = (decided("random_units", sparsity=0.5, seed=seed) for seed in (1, 1, 2))
        assert one.id == same.id
        assert any(not torch.equal(one[key], other[key]) for key in one)
        channels = [one[key].tolist() for key in one if "down_proj" in key.name]
        assert channels[0] != channels[1]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_what_is_left_is_the_model_with_those_units_masked(self, family: str) -> None:
        model, probe = tiny(family), tokens(tiny(family), seed=8)
        pruner = find("random_units")(budget="global", sparsity=0.45)
        plan = pruner.calibrate(model, [])
        with masked(model, {index: keep_of(plan, model, index) for index in range(2)}):
            expected = logits(model, probe)
        found = logits(pruner.apply(model, plan), probe)
        assert float((found - expected).norm() / expected.norm()) < 1e-5

    def test_a_skipped_block_keeps_every_bit(self) -> None:
        plan = decided("flap", skip="1", sparsity=0.5)
        assert not [key for key in plan if ".1." in key.name]
        assert kept(plan)[1] == (2, 96)
        assert plan.promises is not None
        assert plan.promises.of == WHOLE / 2


def keep_of(plan: Plan, model: Any, index: int) -> BlockKeep:
    """Return what a plan leaves of a block, read from its decisions on the matrices that read the units."""
    arch, (_, block) = arch_of(model), blocks(model)[index]
    sizes = block_sizes(block, arch)
    found: dict[str, Tensor] = {
        path: plan[key]
        for key in plan
        for path in (arch.o, arch.down)
        if path and key.name.endswith(f".{index}.{path}.weight") and key.edit.startswith("keep")
    }
    heads = found[arch.o][:: sizes.head_dim] // sizes.head_dim if arch.o in found else None
    groups = None if heads is None else (heads // (sizes.heads // sizes.kv_heads)).unique()
    return BlockKeep(heads=heads, kv_heads=groups, channels=found.get(arch.down))


class TestRepairs:
    @pytest.mark.parametrize("budget", ["uniform", "global"])
    def test_least_squares_is_that_of_the_library(self, budget: str) -> None:
        model = tiny("llama")
        data = [tokens(model, batch=4, length=64, seed=seed) for seed in range(3)]
        fields = {"budget": budget, "units": ["channel"], "sparsity": 0.3}
        repair = {"name": "least_squares", "damping": 1e-9}
        plan = find("wanda_sp")(repair=repair, **fields).calibrate(model, data)
        for prefix, block in blocks(model):
            inputs = reads(model, f"{prefix}.mlp.down_proj", data)
            (key,) = (
                key for key in plan if key.name.startswith(f"{prefix}.mlp.down") and key.kind == "keep.1"
            )
            wanted = inputs @ block.mlp.down_proj.weight.detach().double().T
            exact = torch.linalg.lstsq(inputs[:, plan[key]], wanted).solution.T
            (new,) = (plan[one] for one in plan if one.name == key.name and one.edit == "value")
            assert float((new.double() - exact).norm() / exact.norm()) < 1e-3

    def test_least_squares_errs_less_than_nothing_does(self) -> None:
        model, probe = tiny("llama"), tokens(tiny("llama"), batch=8, length=64)
        dense, errors = logits(model, probe), {}
        for repair in ("none", "bias", "least_squares"):
            other = tiny("llama")
            pruner = find("wanda_sp")(sparsity=0.3, repair=repair)
            pruner.apply(other, pruner.calibrate(other, [probe]))
            errors[repair] = float((logits(other, probe) - dense).norm())
        assert errors["least_squares"] < errors["none"]
        assert errors["bias"] < errors["none"]


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (
                ["wanda_sp", "--sparsity", "0.1", "--set", "units=[kv_group]"],
                "1 of 2 key-value groups can stay",
            ),
            (["flap", "--sparsity", "0.01", "--set", "units=[kv_group]"], "1 of 2 key-value groups can stay"),
            (["cfsp", "--set", "multiple=128"], "no other number of 96 channels can stay"),
            (
                ["wanda_sp", "--sparsity", "0.1", "--set", "units=[channel]", "--set", "multiple=64"],
                "64 of 96",
            ),
            (["flap", "--sparsity", "1:4"], "this method takes a fraction"),
            (["flap", "--set", "skip=0-1"], "no block that is not skipped"),
            (["flap", "--set", "skip=7"], "there is no block 7"),
            (["flap", "--set", "multiple=0"], "greater than or equal to 1"),
            (["flap", "--set", "units=[]"], "at least one"),
            (["cfsp", "--set", "units=[kv_group]"], "channel"),
            (["flap", "--set", "repair=obs"], "least_squares"),
            (["flap", "--set", "budget=owl"], "global"),
            (["flap", "--sparsity", "1"], "1 would remove everything"),
        ],
    )
    def test_it_is_a_usage_error_before_anything_is_calibrated(
        self, words: list[str], said: str, command: Command, llama: Path, tmp_path: Path
    ) -> None:
        done = command("prune", llama, tmp_path / "out", "--method", *words, "--json")
        assert (done.code, done.json["error"]["kind"]) == (2, "usage")
        assert said in done.json["error"]["message"] + done.json["error"]["hint"]
        assert done.json["error"]["hint"]
        assert "calibrate" not in done.err
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("shared", ["weight", "module", "block"])
    def test_tensors_that_two_places_share(self, shared: str) -> None:
        model = tiny("llama")
        first, last = model.model.layers
        if shared == "weight":
            last.mlp.down_proj.weight = first.mlp.down_proj.weight
        elif shared == "module":
            last.mlp = first.mlp
        else:
            model.model.layers[1] = first
        with pytest.raises(UsageError, match="is the same tensor as") as refused:
            forecast_all([find("flap")()], model)
        assert "skip" in str(refused.value.hint)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("width") / "llama", shards=2, dtype=torch.bfloat16)


def weights_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize(("method", "exact"), [("wanda_sp", True), ("cfsp", False)])
def test_forecast_and_report_count_what_the_files_hold(
    method: str, exact: bool, source: Path, tmp_path: Path
) -> None:
    recipe = {"model": str(source), "output": tmp_path / "out", "prune": {"method": method, "sparsity": 0.4}}
    planned = structprune.dry_run(structprune.Recipe.model_validate(recipe))
    report = structprune.prune(source, tmp_path / "out", find(method)(sparsity=0.4), **QUICK)
    held = 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            held += sum(prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    assert report["parameters"]["pruned"] == held
    assert report["bytes"]["pruned"] == sum(map(len, weights_of(tmp_path / "out").values()))
    assert planned["exact"] is exact
    assert ("code" in planned["loads_in"][0]) is not exact
    if exact:
        assert (planned["parameters"], planned["bytes"]) == (
            {key: report["parameters"][key] for key in ("dense", "pruned")},
            report["bytes"],
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "flap"},
        {"method": "cfsp"},
        {"method": "wanda_sp", "budget": "global", "repair": "least_squares"},
    ],
    ids=["flap", "cfsp", "refit"],
)
def test_a_run_stopped_anywhere_resumes_with_the_bytes_of_the_streamed_and_the_resident_run(
    fields: dict[str, str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = fields["method"]
    pruner = find(method)(sparsity=0.4, **{key: value for key, value in fields.items() if key != "method"})
    for name, stream in (("streamed", True), ("resident", False)):
        structprune.prune(source, tmp_path / name, pruner, opening=Opening(stream=stream), **QUICK)
    assert weights_of(tmp_path / "streamed") == weights_of(tmp_path / "resident")

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("calibrate") and done == 1:
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        structprune.prune(
            source, tmp_path / "out", pruner, opening=Opening(stream=True), progress=stop, **QUICK
        )
    report = structprune.prune(source, tmp_path / "out", pruner, opening=Opening(stream=True), **QUICK)
    assert report["blocks_resumed"] == 1
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "streamed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "second", [{"method": "sparsegpt", "sparsity": 0.5}, {"method": "wanda", "sparsity": "2:4"}], ids=str
)
def test_weights_leave_what_units_left(second: dict[str, Any], source: Path, tmp_path: Path) -> None:
    made = []
    for stream in (False, True):
        recipe = structprune.Recipe.model_validate(
            {
                "model": str(source),
                "output": tmp_path / f"out{stream}",
                "prune": [{"method": "flap", "sparsity": 0.3, "multiple": 8}, second],
                "calibration": QUICK["calibration"],
            }
        )
        with short_runs():
            report = structprune.prune(recipe, opening=Opening(stream=stream))
        assert report["verification"]["ok"]
        assert [stage["measured"] == stage["reachable"] for stage in report["stages"]] == [True, True]
        assert report["sparsity"] == 0.5
        made.append(weights_of(tmp_path / f"out{stream}"))
    assert made[0] == made[1]


def test_what_lost_units_recovers_and_still_holds_its_promises(source: Path, tmp_path: Path) -> None:
    recover = {"teacher": str(source), "steps": 2, "check_every": 1, "length": 16}
    report = structprune.prune(source, tmp_path / "out", find("flap")(sparsity=0.4), recover=recover, **QUICK)
    assert report["verification"]["ok"]
    assert structprune.verify(tmp_path / "out", str(source))["ok"]
    listed = json.loads((tmp_path / "out" / "config.json").read_text())["pruned_blocks"]
    assert len(listed) == 2
