"""Attention skip: which attentions leave, what makes up for them, and how the rest generates."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import structprune
from structprune.checkpoint.writing import Writing
from structprune.decide.bandit import Search, subset_preferences
from structprune.errors import Interrupted, UsageError
from structprune.models.arch import arch_of, blocks
from structprune.models.groups import BlockKeep
from structprune.models.masking import masked
from structprune.models.opening import Opening
from structprune.models.streamed import open_model
from structprune.plan.key import Key
from structprune.plan.plan import Plan, PlanWriter
from structprune.pruners.catalogue import find
from structprune.pruners.forecast import forecast_all
from structprune.pruners.structure.attention_skip import AttentionSkip
from structprune.recipe.recipe import Recipe
from structprune.solvers.bypass import FeedForward, RidgeSums
from tests.methods import CALIBRATION, EVALUATION, TEXT, short_runs
from tests.test_block_drop import check_cache, gone, logits, own_words, padded, states_of, stopping
from tests.test_laws import bytes_of
from tests.tiny import CACHE, save_tiny, tiny, tokens

REPAIRS = [(False, False), (True, False), (False, True), (True, True)]


def real_states(model: PreTrainedModel, data: list[dict[str, Tensor]], index: int) -> tuple[Tensor, Tensor]:
    """Return what enters a block and what leaves it, real tokens only, shape [tokens, hidden] each."""
    before, after = [], []
    for batch in data:
        states = states_of(model, batch)
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        before.append(states[index][real])
        after.append(states[index + 1][real])
    return torch.cat(before), torch.cat(after)


def skipped(block: Any, before: Tensor) -> Tensor:
    """Return what a block of a Llama makes of states without its attention."""
    return before + block.mlp(block.post_attention_layernorm(before))


def test_a_feed_forward_that_is_a_product_or_gone_makes_up_for_nothing() -> None:
    products = find("armor")(wrapper_size=8, rounds=1)
    for first in (products, find("block_drop")(units=["mlp"], drop="0")):
        with pytest.raises(UsageError, match=r"layers\.0\.mlp\.gate_proj: gone, or stored as a product"):
            forecast_all([first, AttentionSkip(count=1)], tiny("llama", depth=3))
        plain = AttentionSkip(count=1, adapter=False, refit=False)
        assert forecast_all([first, plain], tiny("llama", depth=3))[-1].exact
    forecast_all(
        [find("block_drop")(units=["mlp"], drop="0"), AttentionSkip(drop="1")], tiny("llama", depth=3)
    )


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, as long as they live, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple) else (made,):
            if isinstance(one, Tensor) and one._base is None and one.data_ptr() not in map(_address, args):
                self.now += one.nbytes
                self.most = max(self.most, self.now)
                weakref.finalize(one, self._forget, one.nbytes)
        return made

    def _forget(self, nbytes: int) -> None:
        self.now -= nbytes


def _address(value: object) -> int | None:
    return value.data_ptr() if isinstance(value, Tensor) else None


class TestTheMemoryOfTheFits:
    @pytest.mark.parametrize(("inputs", "outputs"), [(400, 100), (200, 200)])
    def test_is_at_most_what_is_said_and_not_much_less(self, inputs: int, outputs: int) -> None:
        read, due = torch.randn(500, inputs), torch.randn(500, outputs)
        with LiveTensors() as live:
            sums = RidgeSums(inputs, outputs, torch.device("cpu"))
            sums.add(read, due)
            sums.fit(torch.zeros(outputs, inputs), 0.01, offset=True)
        assert 0.6 * RidgeSums.nbytes(inputs, outputs) < live.most <= RidgeSums.nbytes(inputs, outputs)

    def test_is_part_of_what_a_dry_run_says(self, tmp_path: Path) -> None:
        model = save_tiny("llama", tmp_path / "llama")
        needed = {}
        for adapter, refit in REPAIRS:
            fields = {"method": "attention_skip", "count": 1, "adapter": adapter, "refit": refit}
            recipe = {"model": str(model), "output": str(tmp_path / "out"), "prune": fields}
            needed[adapter, refit] = structprune.dry_run(Recipe.model_validate(recipe))["memory_bytes"]
        nothing = needed[False, False]
        assert needed[True, False] - nothing == RidgeSums.nbytes(64, 64) + 16 * 96 * 64
        assert needed[False, True] - nothing == RidgeSums.nbytes(96, 64) + 8 * 96 * 64
        assert needed[True, True] == max(needed[True, False], needed[False, True])


class TestTheFits:
    @pytest.mark.parametrize("offset", [True, False])
    def test_the_ridge_is_the_one_that_is_written_down(self, offset: bool) -> None:
        draw = torch.Generator().manual_seed(0)
        read, due = (torch.randn(50, size, generator=draw, dtype=torch.float64) for size in (6, 4))
        toward = torch.randn(4, 6, generator=draw, dtype=torch.float64)
        sums = RidgeSums(6, 4, torch.device("cpu"))
        for part in range(0, 50, 20):
            sums.add(read[part : part + 20], due[part : part + 20])
        weight, bias = sums.fit(toward, 0.1, offset=offset)
        x = read - read.mean(0) if offset else read
        y = due - due.mean(0) if offset else due
        ridge = 0.1 * x.square().sum(0).mean()
        # The same as one least squares with rows that say sqrt(ridge) * W = sqrt(ridge) * toward.
        rows = torch.cat([x, ridge.sqrt() * torch.eye(6, dtype=torch.float64)])
        targets = torch.cat([y, ridge.sqrt() * toward.T])
        expected = torch.linalg.lstsq(rows, targets).solution.T
        assert torch.allclose(weight.double(), expected, atol=1e-5)
        centre = due.mean(0) - expected @ read.mean(0) if offset else torch.zeros(4).double()
        assert torch.allclose(bias.double(), centre, atol=1e-5)

    def test_merged_is_unmerged(self) -> None:
        draw = torch.Generator().manual_seed(0)
        gate, up, adapter = (torch.randn(*size, generator=draw) for size in ((24, 16), (24, 16), (16, 16)))
        biases, offset, read = (torch.randn(*size, generator=draw) for size in ((2, 24), (16,), (40, 16)))
        half = FeedForward(gate, biases[0], up, biases[1], torch.nn.SiLU())
        adapted = read @ adapter.T + offset
        expected = torch.nn.functional.silu(adapted @ gate.T + biases[0]) * (adapted @ up.T + biases[1])
        assert torch.allclose(half.merged(adapter, offset).channels(read), expected, rtol=1e-4, atol=1e-3)

    def test_the_loop_finds_the_best_subset(self) -> None:
        worth = torch.tensor([0.0, 0.5, 0.1, 0.4, 0.2])

        def reward(step: int, subset: Any) -> float:
            return float(worth[list(subset)].sum())

        found = [subset_preferences(5, 2, reward, Search(200, 2.0, seed)) for seed in (0, 0, 1)]
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])
        for one in found:
            assert sorted(one.argsort(descending=True)[:2].tolist()) == [1, 3]


class TestScores:
    def test_change_is_how_far_the_output_moves_for_what_the_block_adds(self) -> None:
        model = tiny("llama", depth=3)
        data = padded(model)
        plan = AttentionSkip(sparsity=0.34).calibrate(model, data)
        found = []
        for index, (_, block) in enumerate(blocks(model)):
            before, after = real_states(model, data, index)
            with torch.no_grad():
                moved = (after - skipped(block, before)).square().sum()
            found.append(float(moved / (after - before).square().sum()))
        assert gone(plan) == [(found.index(min(found)), "attention")]
        assert [one.facts["attention"]["score"] for one in plan.blocks] == pytest.approx(found, rel=1e-5)

    @pytest.mark.parametrize("score", ["change", "search"])
    @pytest.mark.parametrize("planted", [0, 2])
    def test_an_attention_that_says_nothing_is_found_first(self, score: Any, planted: int) -> None:
        model = tiny("llama", depth=4)
        torch.nn.init.zeros_(model.get_submodule(f"model.layers.{planted}.self_attn.o_proj").weight)
        plan = AttentionSkip(sparsity=0.25, score=score, steps=200).calibrate(model, own_words(model))
        assert gone(plan) == [(planted, "attention")]

    def test_a_search_that_was_killed_tries_nothing_twice(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny("llama", depth=3)
        pruner, data = AttentionSkip(sparsity=0.34, score="search", steps=6), padded(model)
        whole = pruner.calibrate(model, data)
        with stopping(monkeypatch, 3) as written:
            with pytest.raises(Interrupted):
                pruner.calibrate(model, data, pruner.writer(tmp_path, model, whole.weights))
            written.append(-1)
            assert pruner.calibrate(model, data, pruner.writer(tmp_path, model, whole.weights)).id == whole.id
            assert not {*written[4:]} & {*written[:3]}


def plan_of(model: PreTrainedModel, adapter: bool, refit: bool, index: int) -> Plan:
    pruner = AttentionSkip(drop=str(index), adapter=adapter, refit=refit, damping=1e-6)
    return pruner.calibrate(model, padded(model))


class TestRepairs:
    def test_each_brings_the_block_nearer_to_what_it_was(self) -> None:
        model = tiny("llama", depth=2)
        before, after = real_states(model, padded(model), 0)
        missed = {}
        for adapter, refit in REPAIRS:
            pruned = tiny("llama", depth=2)
            AttentionSkip().apply(pruned, plan_of(model, adapter, refit, 0))
            with torch.no_grad():
                # The first block's input is what it was; padding takes no part.
                missed[adapter, refit] = float((skipped(blocks(pruned)[0][1], before) - after).square().sum())
        assert missed[False, True] < missed[False, False]
        assert missed[True, True] < missed[True, False] < missed[False, False]

    def test_the_refit_is_least_squares(self) -> None:
        model = tiny("llama", depth=2)
        plan = plan_of(model, False, True, 1)
        block: Any = blocks(model)[1][1]
        before, after = real_states(model, padded(model), 1)
        with torch.no_grad():
            read = block.post_attention_layernorm(before)
            inner = torch.nn.functional.silu(block.mlp.gate_proj(read)) * block.mlp.up_proj(read)
        new = plan[Key("model.layers.1.mlp.down_proj.weight", "value")].double()
        # Fewer tokens than channels: any solution that fits, and it must fit as well as the best.
        best = torch.linalg.lstsq(inner.double(), (after - before).double(), driver="gelsd").solution
        ours = (inner.double() @ new.T - (after - before)).square().sum()
        theirs = (inner.double() @ best - (after - before)).square().sum()
        assert ours <= theirs + 1e-3 * (after - before).square().sum()

    def test_biases_that_are_there_are_added_to(self) -> None:
        torch.manual_seed(0)
        config: Any = {"num_attention_heads": 4, "num_key_value_heads": 2, "mlp_bias": True}
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, **config)
        )
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        model.eval()
        plan = AttentionSkip(drop="0").calibrate(model, padded(model))
        before, after = real_states(model, padded(model), 0)
        block: Any = blocks(model)[0][1]
        with torch.no_grad():
            without = (skipped(block, before) - after).square().sum()
        AttentionSkip().apply(model, plan)
        with torch.no_grad():
            assert (skipped(block, before) - after).square().sum() < without

    def test_none_is_the_masked_model(self) -> None:
        model = tiny("qwen3", depth=2)
        plan = plan_of(model, False, False, 0)
        with masked(model, {0: BlockKeep(attention=False)}):
            expected = logits(model)
        assert torch.allclose(logits(AttentionSkip().apply(model, plan)), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("index", [0, 1])
def test_generation_with_a_cache_equals_generation_without(family: str, index: int) -> None:
    """Left-padded, continued and with beams, whichever block lost its attention."""
    model = tiny(family, depth=2)
    AttentionSkip().apply(model, AttentionSkip(drop=str(index)).calibrate(model, padded(model)))
    for beams in (1, 3):
        check_cache(model, beams)
    prompt = tokens(model, length=10)
    mask = torch.ones_like(prompt["input_ids"])
    mask[0, :5] = 0
    first = model(input_ids=prompt["input_ids"][:, :6], attention_mask=mask[:, :6], use_cache=True)
    rest = model(input_ids=prompt["input_ids"][:, 6:], attention_mask=mask, **{CACHE: first.past_key_values})
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    whole = model(**prompt, attention_mask=mask, position_ids=positions)
    # A continuation places its tokens behind the cache: the padded row counts its padding.
    assert (rest.logits[1] - whole.logits[1, 6:]).abs().max() < 1e-4


class TestRuns:
    @pytest.mark.parametrize("fields", [{}, {"propagate": "dense"}, {"score": "search", "steps": 4}], ids=str)
    def test_streamed_and_resident_runs_write_the_same_bytes(
        self, fields: dict[str, Any], tmp_path: Path
    ) -> None:
        model = tiny("llama", depth=3, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / "dense")
        for way in (False, True):
            opened = open_model(tmp_path / "dense", Opening(stream=way))
            AttentionSkip(sparsity=0.6, **fields).calibrate(opened, padded(model)).save(tmp_path / str(way))
        assert bytes_of(tmp_path / "True") == bytes_of(tmp_path / "False")

    @pytest.mark.parametrize("after", [1, 2])
    def test_a_run_killed_between_blocks_goes_on(
        self, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny("llama", depth=3)
        pruner, data = AttentionSkip(sparsity=0.6), padded(model)
        whole = pruner.calibrate(model, data, pruner.writer(tmp_path / "whole", model, "0" * 64))
        write = PlanWriter.write

        def stop(self: PlanWriter, *args: Any) -> None:
            if self.finished == after:
                raise Interrupted(2)
            write(self, *args)

        monkeypatch.setattr(PlanWriter, "write", stop)
        with pytest.raises(Interrupted):
            pruner.calibrate(model, data, pruner.writer(tmp_path / "out", model, "0" * 64))
        monkeypatch.setattr(PlanWriter, "write", write)
        assert pruner.calibrate(model, data, pruner.writer(tmp_path / "out", model, "0" * 64)).id == whole.id
        assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")

    def test_a_second_stage_and_a_recovery_keep_it(self, tmp_path: Path) -> None:
        stages = [{"method": "attention_skip", "sparsity": 0.4}, {"method": "wanda", "sparsity": "2:4"}]
        recipe = Recipe.model_validate(
            {
                "model": str(save_tiny("llama", tmp_path / "dense", depth=3)),
                "output": str(tmp_path / "out"),
                "prune": stages,
                "calibration": CALIBRATION,
                "evaluate": EVALUATION,
                "recover": {"steps": 2, "data": TEXT, "length": 16, "batch_size": 2},
            }
        )
        with short_runs():
            report = structprune.prune(recipe, writing=Writing(reload=False))
        assert report["verification"]["ok"], report
        opened = open_model(tmp_path / "out")
        arch = arch_of(opened)
        assert [not [*block.get_submodule(arch.attention).parameters()] for _, block in blocks(opened)].count(
            True
        ) == 1


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt2", "phi3", "mixtral", "opt"])
def test_another_family_is_refused_by_name(family: str) -> None:
    with pytest.raises(UsageError, match="model type") as refused:
        AttentionSkip(sparsity=0.5).forecast(tiny(family))
    assert "llama" in str(refused.value.hint)
