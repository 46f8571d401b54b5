"""Ranks by importance: exact totals, one scale, blocks that later leave, and adapters that PEFT opens."""

import copy
import json
import signal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, PreTrainedModel

import structprune
import structprune.checkpoint.adapter
from structprune.checkpoint.adapter import read_adapter
from structprune.checkpoint.writing import Writing
from structprune.cli.summary import recovery_lines
from structprune.errors import EnvironmentFailure, InputError, Interrupted, UsageError
from structprune.models.opening import Opening
from structprune.plan.plan import Plan
from structprune.progress import Progress, silent
from structprune.pruners.catalogue import find
from structprune.recipe.options import EvaluateOptions, RecoverOptions
from structprune.recipe.recipe import Recipe, assemble
from structprune.recovery.masked_lora import MaskedLayers
from structprune.recovery.masks import nonzero_masks
from structprune.recovery.ranks import block_importance, proportional_ranks, spell_out
from tests.tiny import save_tiny, tiny, tokens

DEPTH, RANK, ALPHA = 4, 6, 9
TEXT = "".join(f"{number} follows {number - 1}, and {number + 1} comes next. " for number in range(1, 400))
TRAINING: dict[str, Any] = {"steps": 16, "check_every": 8, "length": 32, "learning_rate": 1e-2, "rank": RANK}
EVALUATION = EvaluateOptions(text=("demo",), windows=2, length=32, generations=False)
WIDTH: dict[str, Any] = {"sparsity": 0.3, "budget": {"name": "sigmoid", "gain": 60}}
CPU = Opening(device="cpu")


def cut(model: PreTrainedModel, *stages: tuple[str, dict[str, Any]]) -> list[Plan]:
    """Carry stages out on a model; return their plans."""
    plans = []
    for method, fields in stages:
        pruner = find(method)(**fields)
        plans.append(pruner.calibrate(model, [tokens(model)]))
        pruner.apply(model, plans[-1])
    return plans


@pytest.mark.parametrize(
    ("importance", "rank", "expected"),
    [
        ([1, 1, 1], 5, [5, 5, 5]),
        ([1, 2, 3], 4, [2, 4, 6]),
        ([1, 1, 2], 3, [2, 2, 5]),  # 2.25, 2.25, 4.5
        ([0, 1, 99], 2, [1, 1, 4]),
        ([1, 1, 1, 97], 1, [1, 1, 1, 1]),
        ([0.9, 0.9, 10, 10], 2, [1, 1, 3, 3]),
    ],
)
def test_ranks_by_hand(importance: list[float], rank: int, expected: list[int]) -> None:
    given = {str(index): Fraction(value) for index, value in enumerate(importance)}
    assert list(proportional_ranks(given, rank).values()) == expected


def test_the_total_is_exact_and_more_importance_never_gets_less() -> None:
    generator = torch.Generator().manual_seed(0)
    for blocks in (1, 3, 32):
        for rank in (1, 2, 7, 16):
            drawn = (10 * torch.randn(blocks, generator=generator)).sigmoid().sort().values.tolist()
            given = {str(index): Fraction(value) for index, value in enumerate(drawn)}
            found = [*proportional_ranks(given, rank).values()]
            assert sum(found) == blocks * rank and min(found) >= 1
            assert found == sorted(found)


def test_every_tensor_of_a_block_has_its_rank_and_all_have_one_scale() -> None:
    model = tiny("mixtral", depth=3)
    plan = cut(tiny("llama", depth=3), ("cfsp", WIDTH))[0]
    options = spell_out(RecoverOptions(rank=RANK, alpha=ALPHA, ranks="importance"), model, [plan])
    expected = proportional_ranks(block_importance(model, [plan]), RANK)
    assert len(set(expected.values())) > 1
    layers = MaskedLayers(
        model,
        list(nonzero_masks(model)),
        rank=RANK,
        alpha=ALPHA,
        ranks=dict(options.ranks),
        alphas=options.alphas,
    )
    for name, factors in layers.factors().items():  # linear layers and fused experts
        assert factors.rank == next(
            rank for prefix, rank in expected.items() if name.startswith(f"{prefix}.")
        )
        assert factors.scaling == pytest.approx(ALPHA / RANK, rel=1e-15)


def test_a_block_that_later_left_has_no_part_in_the_total() -> None:
    model = tiny("llama", depth=DEPTH)
    plans = cut(model, ("cfsp", WIDTH | {"skip": "0"}), ("block_drop", {"drop": "1"}))
    told = [Fraction(one) for one in plans[0].facts["importance"]]
    found = block_importance(model, plans)
    assert list(found) == [f"model.layers.{index}" for index in range(DEPTH - 1)]
    # The skipped block trains like any other.
    assert list(found.values()) == [told[0], *told[2:]]
    assert sum(proportional_ranks(found, RANK).values()) == (DEPTH - 1) * RANK


def test_a_block_with_nothing_to_train_has_no_part_in_the_total() -> None:
    model = tiny("llama", depth=DEPTH)
    gone = {"units": "attention,mlp", "drop": "2"}
    plans = cut(model, ("cfsp", WIDTH), ("block_drop", gone))
    assert list(block_importance(model, plans)) == [f"model.layers.{index}" for index in (0, 1, 3)]


@pytest.mark.parametrize("told", [[0.5] * 3, [0.5, 0.5, 0.5, -1], [0.0] * 4, [0.5, 0.5, 0.5, "x"], 7])
def test_importance_that_does_not_fit_is_refused(told: object) -> None:
    model = tiny("llama", depth=DEPTH)
    plans = cut(model, ("cfsp", WIDTH))
    plans[0].facts["importance"] = told
    with pytest.raises(InputError, match=r"importance (of 3 blocks.*the model has 4|in the plan of cfsp)"):
        block_importance(model, plans)


def test_what_tells_no_importance_is_named() -> None:
    model = tiny("llama", depth=DEPTH)
    plans = cut(model, ("magnitude_units", {"sparsity": 0.3}))
    for given, said in ((plans, "magnitude_units tells none"), ([], "there is no plan")):
        with pytest.raises(UsageError, match=said) as refused:
            block_importance(model, given)
        assert "budget: sigmoid" in refused.value.hint


def recipe(**stage: object) -> Recipe:
    run = {"model": "demo", "output": "out", "prune": {"method": "flap", **stage}}
    return assemble(run, sets=["recover.ranks=importance"])


def test_a_recipe_is_refused_before_anything_is_read() -> None:
    with pytest.raises(UsageError, match="flap tells none"):
        recipe(sparsity=0.3)
    with pytest.raises(UsageError, match="flap tells none"):
        recipe(sparsity=0, budget="sigmoid")
    assert recipe(sparsity=0.3, budget="sigmoid").recover.ranks == "importance"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ranks": "importence"}, r"^recover\.ranks: found 'importence'"),
        ({"ranks": {"down_proj": 0}}, r"^recover\.ranks\.down_proj: found 0"),
        ({"ranks": "importance", "alphas": {"down_proj": 2}}, r"recover\.alphas: ranks by importance"),
    ],
)
def test_what_cannot_be_is_named_by_its_key(given: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        assemble({"model": "demo", "output": "out", "prune": "cfsp", "recover": given})


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dense model, a cut one of unequal widths, and a text."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "text.txt").write_text(TEXT)
    structprune.prune(
        save_tiny("llama", folder / "dense", depth=DEPTH),
        folder / "pruned",
        find("cfsp")(**WIDTH),
        calibration={"samples": 6, "length": 32},
        evaluate=EVALUATION,
        writing=Writing(reload=False),
    )
    return folder


def recover(
    pruned: Path, output: Path, *, progress: Progress = silent, ranks: Any = "importance", **training: Any
) -> dict[str, Any]:
    options = RecoverOptions(data=str(pruned / "text.txt"), ranks=ranks, **TRAINING | training)
    return structprune.recover(
        str(pruned / "pruned"),
        output,
        options,
        opening=CPU,
        evaluate=EVALUATION,
        writing=Writing(reload=False),
        progress=progress,
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it
def test_a_kept_adapter_opens_in_plain_peft_and_says_what_merging_says(pruned: Path, tmp_path: Path) -> None:
    report = recover(pruned, tmp_path / "adapter", keep_adapter=True, alpha=ALPHA)
    assert report["loads_in"] == ["structprune", "peft"]
    ranks = report["recovery"]["ranks"]
    assert sum(ranks.values()) == DEPTH * RANK and len(set(ranks.values())) > 1
    assert f"{min(ranks.values())} to {max(ranks.values())}" in recovery_lines(report)
    recover(pruned, tmp_path / "merged", alpha=ALPHA)
    merged, _ = structprune.load(tmp_path / "merged")
    opened, _ = structprune.load(tmp_path / "adapter")
    assert all(torch.equal(p, opened.get_parameter(name)) for name, p in merged.named_parameters())

    base = AutoModelForCausalLM.from_pretrained(pruned / "pruned", trust_remote_code=True)
    tuned = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    before, after, expected = (one(**tokens(merged)).logits for one in (base, tuned, merged))
    assert torch.allclose(after, expected, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-2)
    assert structprune.verify(tmp_path / "adapter")["ok"]


def test_a_plain_adapter_that_was_changed_is_refused(pruned: Path, tmp_path: Path) -> None:
    recover(pruned, tmp_path / "adapter", keep_adapter=True)
    path = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(path.read_text())
    for change, message in (
        ({"use_dora": True}, "use_dora"),
        ({"r": 0}, "r:"),
        ({"target_modules": []}, "not"),
    ):
        path.write_text(json.dumps(said | change))
        with pytest.raises(InputError, match=message):
            read_adapter(tmp_path / "adapter")


def test_an_adapter_of_a_model_with_zeros_stays_ours(pruned: Path, tmp_path: Path) -> None:
    model = copy.deepcopy(structprune.load(pruned / "pruned")[0])
    name = "model.layers.0.mlp.down_proj.weight"
    assert structprune.checkpoint.adapter.can_be_plain(model, {name: 0})
    assert not structprune.checkpoint.adapter.can_be_plain(model, {name: 1})
    assert not structprune.checkpoint.adapter.can_be_plain(model, {"model.norm.weight": 0})


@pytest.mark.parametrize("keep_adapter", [False, True], ids=["merged", "adapter"])
def test_an_interrupted_recovery_goes_on_with_the_same_ranks(
    pruned: Path, tmp_path: Path, keep_adapter: bool
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "recover" and done == 12:
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        recover(pruned, tmp_path / "out", keep_adapter=keep_adapter, progress=stop)
    with pytest.raises(EnvironmentFailure, match=r"recover\.(ranks|alphas)"):
        recover(pruned, tmp_path / "out", keep_adapter=keep_adapter, ranks={})
    report = recover(pruned, tmp_path / "out", keep_adapter=keep_adapter)
    assert report["recovery"]["steps_resumed"] == 8
    recover(pruned, tmp_path / "whole", keep_adapter=keep_adapter)
    first, second = (sorted((tmp_path / one).glob("*.safetensors")) for one in ("out", "whole"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_recipe_prunes_and_recovers_with_them(pruned: Path, tmp_path: Path) -> None:
    report = structprune.prune(
        pruned / "dense",
        tmp_path / "out",
        find("cfsp")(**WIDTH),
        calibration={"samples": 6, "length": 32},
        recover={"data": str(pruned / "text.txt"), "ranks": "importance", **TRAINING},
        evaluate=EVALUATION,
        opening=CPU,
        writing=Writing(reload=False),
    )
    plan = Plan.load(tmp_path / "out" / "structprune" / "plans" / "01-cfsp")
    model, _ = structprune.load(tmp_path / "out")
    expected = proportional_ranks(block_importance(model, [plan]), RANK)
    assert list(report["recovery"]["ranks"].values()) == list(expected.values())
    assert "ranks: importance" in (tmp_path / "out" / "structprune" / "recipe.yaml").read_text()

    (stage,) = report["stages"]
    dense, left = (
        sum(p.numel() for p in structprune.load(pruned / one)[0].parameters()) for one in ("dense", "pruned")
    )
    assert plan.promises is not None
    assert stage["measured"] * plan.promises.of == pytest.approx(dense - left)
    assert stage["measured"] == stage["reachable"]
    said = next(line for line in recovery_lines(report).splitlines() if line.startswith("got"))
    assert f"{stage['measured'] * 100:.6g}% of the prunable parameters removed" in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| {stage['reachable']:.2%} | {stage['measured']:.2%} |" in card
    assert structprune.verify(tmp_path / "out")["stages"] == {"01-cfsp": stage["measured"]}
