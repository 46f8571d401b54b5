"""Expert drop: scores against the definition, plants that must leave, and the smaller model that is left."""

import json
import logging
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import structprune
from structprune.calibration.notebook import Notebook
from structprune.checkpoint.plans import plans_of
from structprune.cli.summary import pruning_lines
from structprune.errors import InputError, Interrupted, UsageError
from structprune.models.arch import blocks
from structprune.models.groups import BlockKeep
from structprune.models.identity import architecture_of
from structprune.models.masking import masked
from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.models.streamed import open_model
from structprune.plan.key import Key
from structprune.plan.plan import Plan
from structprune.pruners.structure.expert_drop import ExpertDrop
from tests.methods import QUICK, short_runs
from tests.tiny import save_tiny, tiny, tokens

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


def batches(model: nn.Module) -> list[dict[str, Tensor]]:
    """Return two batches; some tokens of the first are padding, which must not count."""
    found = [tokens(model, batch=2, length=24, seed=seed) for seed in range(2)]
    found[0]["attention_mask"] = torch.ones_like(found[0]["input_ids"])
    found[0]["attention_mask"][0, :9] = 0
    return found


def kept(plan: Plan) -> list[list[int]]:
    """Return which experts of each block stay."""
    return [
        next(block[key].tolist() for key in block if key.edit in ("members", "keep"))
        for block in plan.blocks
        if any(key.edit in ("members", "keep") for key in block)
    ]


def scores(plan: Plan) -> list[Tensor]:
    return [block[key] for block in plan.blocks for key in block if key.kind == "score"]


def definition(model: PreTrainedModel, data: list[dict[str, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Return mean g ||f|| over each expert's tokens, and its tokens, token by token and in float64."""
    read: dict[int, list[Tensor]] = {}
    mixtures = [block.mlp for _, block in blocks(model)]
    model.requires_grad_(False)
    for batch in data:
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        handles = [
            mixture.register_forward_pre_hook(
                lambda _, inputs, at=at, real=real: read.setdefault(at, []).append(inputs[0][real])
            )
            for at, mixture in enumerate(mixtures)
        ]
        model(**batch)
        for handle in handles:
            handle.remove()
    means, counts = [], []
    for at, mixture in enumerate(mixtures):
        router, fused = mixture.gate, mixture.experts
        total, count = (torch.zeros(len(router.weight), dtype=torch.float64) for _ in range(2))
        for token in torch.cat(read[at]).double():
            weights = (router.weight.double() @ token).softmax(0)
            chosen = weights.topk(router.top_k)
            norm = chosen.values.sum() if getattr(router, "norm_topk_prob", True) else 1
            for weight, expert in zip(chosen.values / norm, chosen.indices, strict=True):
                gate, up = (fused.gate_up_proj[expert].double() @ token).chunk(2)
                output = fused.down_proj[expert].double() @ (nn.functional.silu(gate) * up)
                total[expert] += weight * output.norm()
                count[expert] += 1
        means.append(total / count.clamp_min(1))
        counts.append(count)
    return means, counts


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("renormalised", [False, True])
def test_scores_are_those_of_the_definition(family: str, renormalised: bool, monkeypatch) -> None:
    model = tiny(family)
    for _, block in blocks(model):
        if hasattr(block.mlp.gate, "norm_topk_prob"):
            monkeypatch.setattr(block.mlp.gate, "norm_topk_prob", renormalised)
    means, counts = definition(model, batches(model))
    for score, wanted in (("reap", means), ("frequency", [count / count.sum() for count in counts])):
        plan = ExpertDrop(score=score, sparsity=0.5, keep_scores=True).calibrate(model, batches(model))
        for found, value, stay in zip(scores(plan), wanted, kept(plan), strict=True):
            torch.testing.assert_close(found, value.float(), rtol=1e-5, atol=0)
            assert stay == sorted(value.topk(2).indices.tolist())
    assert [block.facts["routed"] for block in plan.blocks] == [count.int().tolist() for count in counts]


@torch.no_grad()
def plant(model: PreTrainedModel) -> None:
    """Make expert 0 unreachable and expert 2 a copy of 3 that the router always likes less.

    Every token is routed to 3: those of even ids also to 1, at the same weight, the others to 2, at a fifth.
    """
    # Of what a router reads, feature 0 is the same for all tokens and feature 1 has the sign of their parity.
    embeddings = model.get_input_embeddings().weight
    embeddings[:, 0] = 3
    embeddings[0::2, 1], embeddings[1::2, 1] = 3, -3
    for _, block in blocks(model):
        block.post_attention_layernorm.weight[:2] = 1
        fused = block.mlp.experts
        for parameter in (fused.gate_up_proj, fused.down_proj):
            parameter[2] = parameter[3]
        block.mlp.gate.weight.zero_()
        block.mlp.gate.weight[:, :2] = torch.tensor([[-1.6, 0], [-0.5, 0.5], [-0.27, 0], [0, 0]])


@pytest.mark.parametrize("family", MIXTURES)
def test_dead_and_duplicate_experts_leave_first(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(family)
    plant(model)
    with caplog.at_level(logging.WARNING):
        plan = ExpertDrop(sparsity=0.5).calibrate(model, batches(model))
    assert kept(plan) == [[1, 3], [1, 3]]
    assert "reached 2 of the 8 experts" in caplog.text
    assert [block.facts["unseen"] for block in plan.blocks] == [
        [f"model.layers.{at}.mlp.experts[0]"] for at in range(2)
    ]
    assert kept(ExpertDrop(sparsity=0.25).calibrate(model, batches(model))) == [[1, 2, 3], [1, 2, 3]]
    with torch.no_grad():
        for _, block in blocks(model):
            block.mlp.experts.down_proj[1] = 0  # reached, and of no use: what only a frequency does not see
    assert kept(ExpertDrop(sparsity=0.5).calibrate(model, batches(model))) == [[2, 3], [2, 3]]


CHOICES: list[dict[str, Any]] = [
    {"sparsity": 0.5},
    {"budget": "global", "sparsity": 0.25},
    {"score": "random", "seed": 3, "skip": "1"},
    {"score": "random", "budget": "global", "sparsity": 0.4},
    {"propagate": "pruned", "score": "frequency"},
]


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("fields", CHOICES, ids=str)
def test_removed_is_masked_streamed_and_resident(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    folder, data = save_tiny(family, tmp_path / "model"), batches(tiny(family))
    pruner = ExpertDrop(**fields)
    ways = [open_model(folder, Opening(stream=stream)) for stream in (False, True)]
    plans = [pruner.calibrate(model, data) for model in ways]
    assert plans[0].id == plans[1].id
    here = [any(key.edit == "members" for key in block) for block in plans[0].blocks]
    stays = iter(kept(plans[0]))
    keeps = {at: BlockKeep(experts=torch.tensor(next(stays))) for at, cut in enumerate(here) if cut}
    model = tiny(family)
    with masked(model, keeps):
        expected = logits(model, data[0])
    for way in ways:
        found = logits(pruner.apply(way, plans[0]), data[0])
        assert (found - expected).norm() / expected.norm() < 1e-5
    promised = plans[0].promises
    assert promised is not None and promised.removed > 0
    forecast = pruner.forecast(tiny(family))
    assert promised.of == forecast.of
    assert forecast.reachable in ([promised.removed] if forecast.exact else [None])


@pytest.mark.parametrize("family", MIXTURES)
def test_every_block_loses_the_same_and_plain_transformers_opens_it(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "model", shards=2, dtype=torch.bfloat16)
    with short_runs():
        report = structprune.prune(folder, tmp_path / "out", ExpertDrop(sparsity=0.25), **QUICK)
    assert report["verification"]["ok"]
    (stage,) = report["stages"]
    assert stage["measured"] == stage["reachable"] == 0.25
    small, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    assert small.config.num_experts_per_tok == 2
    assert [len(block.mlp.experts.down_proj) for _, block in blocks(small)] == [3, 3]
    assert [block.mlp.gate.num_experts for _, block in blocks(small)] == [3, 3]
    probe = batches(small)[0]
    assert torch.equal(logits(small, probe), logits(open_model(tmp_path / "out"), probe))
    assert "pruned_blocks" not in json.loads((tmp_path / "out/config.json").read_text())


def test_unequal_blocks_are_proved_in_a_fresh_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("qwen3_moe", tmp_path / "model", dtype=torch.bfloat16)
    with short_runs():
        told = structprune.prune(
            folder, tmp_path / "out", ExpertDrop(skip="0"), **QUICK | {"writing": structprune.Writing()}
        )
    assert told["verification"]["ok"]
    assert any("transformers" in loader for loader in told["loads_in"])
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # Transformers asks a class's file whether kernels may be chosen, and remembers what it found on the way.
    shipped = get_class_from_dynamic_module("modeling_pruned.PrunedModel", str(tmp_path / "out"))
    for name in ("experts", "attn"):
        kept = f"_can_set_{name}_implementation_cached_value"
        monkeypatch.delattr(Qwen3MoeForCausalLM, kept, raising=False)
        assert getattr(shipped, f"_can_set_{name}_implementation")()


def test_experts_of_all_blocks_compete() -> None:
    model = tiny("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj *= 0.01
    plan = ExpertDrop(budget="global", sparsity=0.25).calibrate(model, batches(model))
    # Tokens are routed to two, so that two is what the worse block keeps of its four.
    assert [block.facts["kept"]["experts"] for block in plan.blocks] == [2, 4]
    assert [entry["experts"] for entry in plan.patch["pruned_blocks"]] == [2, 4]
    most = ExpertDrop(budget="global", sparsity=0.5).calibrate(model, batches(model))
    assert [block.facts["kept"]["experts"] for block in most.blocks] == [2, 2]


def test_a_run_killed_while_it_measures_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("mixtral", tmp_path / "model")
    pruner, data = ExpertDrop(budget="global"), batches(tiny("mixtral"))

    def run(name: str) -> Plan:
        model = open_model(folder, Opening(stream=True))
        return pruner.calibrate(model, data, pruner.writer(tmp_path / name, model, "weights"))

    whole = run("whole")
    write = Notebook.write

    def stop(self: Notebook, block: int, tensors: dict[str, Tensor]) -> None:
        write(self, block, tensors)
        raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(Notebook, "write", stop)
        with pytest.raises(Interrupted):
            run("out")
    assert run("out").id == whole.id


@pytest.mark.parametrize(
    ("fields", "said", "hint"),
    [
        ({"sparsity": 0.1}, "0.1 of the 4 experts", r"0\.25 \(3 stay\) or 0\.5 \(2 stay\)"),
        ({"sparsity": 0.7}, "would leave 1 of the 4 experts of model.layers.0", "at most 0.5"),
        ({"sparsity": 0.7, "budget": "global"}, "would leave 2 of the 8 experts of the model", "at most 0.5"),
        ({"sparsity": 0.05, "budget": "global"}, "0.05 of the 8 experts", r"0\.125 \(7 stay\)"),
        ({"skip": "0-1"}, "every block with a mixture", "skip fewer"),
        ({"skip": "7"}, "there is no block 7", "0 to 1"),
    ],
)
def test_what_cannot_leave_is_refused_before_anything_is_read(
    fields: dict[str, Any], said: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        ExpertDrop(**fields).forecast(tiny("mixtral"))
    assert re.search(hint, caught.value.hint or "")


@pytest.mark.parametrize("family", ["llama", "gpt2", "llava"])
def test_other_families_are_refused_by_name(family: str) -> None:
    with pytest.raises(UsageError, match=f"model type '{family}' has no mixture") as caught:
        ExpertDrop().calibrate(tiny(family), [])
    assert caught.value.hint and "mixtral, qwen2_moe, qwen3_moe" in caught.value.hint


def test_kept_scores_decide_for_another_share_and_another_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny("qwen3_moe", tmp_path / "model")
    tuned = save_tiny("qwen3_moe", tmp_path / "tuned", seed=1)
    other = save_tiny("mixtral", tmp_path / "other")
    looked, taken = ExpertDrop(sparsity=0.5), ExpertDrop(sparsity=0.5, keep_scores=False)
    with short_runs():
        structprune.prune(folder, tmp_path / "scores", ExpertDrop(keep_scores=True), **QUICK)
        structprune.prune(folder, tmp_path / "looked", looked, **QUICK)
        structprune.prune(folder, tmp_path / "taken", taken, scores=tmp_path / "scores", **QUICK)
        assert kept(plans_of(tmp_path / "taken")[0]) == kept(plans_of(tmp_path / "looked")[0])
        assert "other weights" not in caplog.text
        structprune.prune(tuned, tmp_path / "theirs", taken, scores=tmp_path / "scores", **QUICK)
        assert "other weights" in caplog.text
        assert kept(plans_of(tmp_path / "theirs")[0]) == kept(plans_of(tmp_path / "looked")[0])
        with pytest.raises(InputError, match="scores are of another architecture"):
            structprune.prune(other, tmp_path / "no", taken, scores=tmp_path / "scores", **QUICK)
        with pytest.raises(UsageError, match="another score"):
            random = ExpertDrop(score="random")
            structprune.prune(folder, tmp_path / "no", random, scores=tmp_path / "scores", **QUICK)
        with pytest.raises(InputError, match="keeps no scores"):
            structprune.prune(folder, tmp_path / "no", taken, scores=tmp_path / "looked", **QUICK)


def test_a_second_stage_prunes_the_experts_that_are_left(tmp_path: Path) -> None:
    folder = save_tiny("mixtral", tmp_path / "model", shards=2, dtype=torch.bfloat16)
    made = []
    for stream in (False, True):
        out = tmp_path / f"out-{stream}"
        stages = [{"method": "expert_drop", "sparsity": 0.25}, {"method": "wanda", "sparsity": "2:4"}]
        recipe = structprune.Recipe.model_validate(
            {"model": str(folder), "output": str(out), "prune": stages}
            | {key: QUICK[key] for key in ("calibration", "evaluate")}
        )
        with short_runs():
            told = structprune.prune(recipe, opening=Opening(stream=stream), writing=QUICK["writing"])
        assert [stage["measured"] for stage in told["stages"]] == [0.25, 0.5]
        assert told["verification"]["ok"]
        plans = plans_of(out)
        assert plans[1].architecture == architecture_of(open_model(out))
        assert Key("model.layers.1.block_sparse_moe.experts.2.w1.weight", "mask") in plans[1]
        made.append([plan.id for plan in plans])
    assert made[0] == made[1]


def test_random_scores_differ_between_blocks_and_seeds() -> None:
    model = tiny("mixtral")
    drawn = [
        scores(ExpertDrop(score="random", seed=seed, keep_scores=True).calibrate(model, []))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.stack(drawn[0]), torch.stack(drawn[1]))
    different = [drawn[0][0], drawn[0][1], drawn[2][0], drawn[2][1]]
    assert all(not torch.equal(one, other) for one, other in pairwise(different))


def test_a_mixture_that_lost_experts_is_recovered(tmp_path: Path) -> None:
    folder = save_tiny("mixtral", tmp_path / "model")
    recipe = structprune.Recipe.model_validate(
        {
            "model": str(folder),
            "output": str(tmp_path / "out"),
            "prune": [{"method": "expert_drop", "sparsity": 0.25}, {"method": "wanda", "sparsity": "2:4"}],
            "recover": {"steps": 2, "check_every": 1, "length": 16},
        }
        | {key: QUICK[key] for key in ("calibration", "evaluate")}
    )
    with short_runs():
        report = structprune.prune(recipe, writing=QUICK["writing"])
    assert report["verification"]["ok"]
    assert "25% of the prunable parameters removed, 50% of the prunable weights removed" in pruning_lines(
        report
    )
    assert pruning_lines(report).startswith("trained        ")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [len(block.mlp.experts.down_proj) for _, block in blocks(small)] == [3, 3]
