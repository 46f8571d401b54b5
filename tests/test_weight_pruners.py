"""What the weight pruners decide, against numbers worked out by hand and the sheet's own checks."""

import logging
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from structprune.calibration.collect import collect_inputs
from structprune.calibration.statistics import InputSums, Parts, Statistics
from structprune.errors import UsageError
from structprune.models.arch import arch_of, blocks, linears
from structprune.models.walk import Block, Walk
from structprune.plan.key import Key
from structprune.pruners.catalogue import find
from structprune.pruners.weight.magnitude import Magnitude
from structprune.pruners.weight.random import Random
from structprune.pruners.weight.wanda import Wanda
from tests.tiny import tiny, tokens

WEIGHT = torch.tensor([[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, -2.0, 1.0]])


NORM: Parts = frozenset({"norm"})


def seen(block: Block, *, advance: bool) -> Mapping[str, InputSums]:
    """Return what Wanda remembers of a block's inputs."""
    return collect_inputs(block, block.linears, NORM, advance=advance).inputs


def norms(width: int) -> InputSums:
    """Return what has seen no token yet."""
    return InputSums(NORM, width, torch.device("cpu"))


def norm(values: list[float], tokens: int = 1) -> Statistics:
    """Return the statistics of one token with these features."""
    found = norms(len(values))
    found.add(torch.tensor([values]).expand(tokens, -1))
    return Statistics(found)


class TestScores:
    def test_wanda_multiplies_each_weight_by_the_norm_of_its_input(self) -> None:
        score = Wanda().score(WEIGHT, norm([2.0, 1.0, 0.0, 0.5]))
        assert torch.equal(score, torch.tensor([[2.0, 2.0, 0.0, 2.0], [8.0, 3.0, 0.0, 0.5]]))

    def test_the_squared_wanda_score_is_the_error_of_deleting_that_weight_alone(self) -> None:
        inputs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        stat = norms(4)
        stat.add(inputs)
        without = WEIGHT.clone()
        without[0, 2] = 0
        error = (inputs @ WEIGHT.T - inputs @ without.T).square().sum()
        assert torch.isclose(Wanda().score(WEIGHT, Statistics(stat))[0, 2].square(), error, rtol=1e-5)

    def test_with_orthogonal_inputs_the_squared_scores_of_removed_weights_add_up_to_the_output_error(
        self,
    ) -> None:
        inputs = torch.linalg.qr(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))[0]
        inputs = inputs * torch.arange(1.0, 9.0)
        weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
        stat = norms(8)
        stat.add(inputs)
        score = Wanda().score(weight, Statistics(stat))
        keep = score > score.median(dim=1, keepdim=True).values
        error = (inputs @ (weight - weight * keep).T).square().sum()
        assert torch.isclose(score[~keep].square().sum(), error, rtol=1e-5)

    def test_equal_norms_make_wanda_magnitude_by_row(self) -> None:
        stat = norm([3.0] * 4)
        order = Wanda().score(WEIGHT, Statistics(stat)).argsort(dim=1, stable=True)
        assert torch.equal(order, Magnitude().score(WEIGHT, Statistics()).argsort(dim=1, stable=True))

    def test_bfloat16_weights_are_scored_in_float32(self) -> None:
        assert Wanda().score(WEIGHT.bfloat16(), norm([1.0] * 4)).dtype == torch.float32

    def test_random_scores_depend_on_the_seed_and_on_the_matrix(self) -> None:
        one = Random(seed=0).score(WEIGHT, Statistics())
        assert torch.equal(one, Random(seed=0).score(WEIGHT.clone(), Statistics()))
        assert not torch.equal(one, Random(seed=1).score(WEIGHT, Statistics()))
        assert not torch.equal(one, Random(seed=0).score(-WEIGHT, Statistics()))


class TestNorm:
    def test_it_is_the_l2_norm_over_all_tokens_however_they_are_batched(self) -> None:
        inputs = torch.randn(700, 24, generator=torch.Generator().manual_seed(0))
        whole, parts = norms(24), norms(24)
        whole.add(inputs)
        for part in inputs.split(1):
            parts.add(part)
        torch.testing.assert_close(whole.norm, parts.norm, rtol=1e-6, atol=0)
        torch.testing.assert_close(whole.norm, inputs.norm(dim=0))
        assert whole.tokens == parts.tokens == 700

    def test_float16_activations_whose_squares_overflow_are_counted(self) -> None:
        stat = norms(1)
        stat.add(torch.full((4, 1), 60000.0, dtype=torch.float16))
        # The square of 60000 is far above the largest float16, 65504.
        assert stat.norm.item() == pytest.approx(120000)

    def test_two_processes_add_up_to_one(self) -> None:
        inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        whole, first, second = (norms(8) for _ in range(3))
        whole.add(inputs)
        first.add(inputs[:20])
        second.add(inputs[20:])
        first.merge(second)
        torch.testing.assert_close(first.norm, whole.norm)

    def test_an_input_that_no_token_reached_weighs_all_features_alike(self) -> None:
        assert torch.equal(norms(3).norm, torch.ones(3))


class TestWalk:
    def test_walking_the_blocks_gives_the_models_own_hidden_states(self) -> None:
        model = tiny("gemma3")  # sliding and full attention, two rotary tables
        batch = tokens(model, batch=3, length=40)
        walk = Walk(model, [batch])
        for block in walk:
            block.advance()
        with torch.no_grad():
            states = model.base_model(**batch, output_hidden_states=True, use_cache=False).hidden_states
        # The last hidden state of the model is normed, that of the walk is not.
        norm = model.base_model.norm
        assert torch.equal(norm(walk.hidden[0]), states[-1])

    def test_linears_that_read_the_same_tensor_share_one_statistic(self) -> None:
        model = tiny("llama")
        block = next(iter(Walk(model, [tokens(model)])))
        found = seen(block, advance=False)
        kinds = {label.rpartition(".")[2]: stat for label, stat in found.items()}
        assert kinds["q_proj"] is kinds["k_proj"] is kinds["v_proj"]
        assert kinds["gate_proj"] is kinds["up_proj"]
        assert len({id(stat) for stat in kinds.values()}) == 4

    @pytest.mark.parametrize("family", ["llama", "opt", "mixtral", "qwen2_moe"])
    def test_padding_never_enters_a_statistic(self, family: str) -> None:
        model = tiny(family)
        short = tokens(model, batch=1, length=20, seed=1)["input_ids"]
        long = tokens(model, batch=1, length=32, seed=2)["input_ids"]
        pad = torch.zeros(1, 12, dtype=torch.long)
        padded = {
            "input_ids": torch.cat([torch.cat([short, pad], dim=1), long]),
            "attention_mask": torch.tensor([[1] * 20 + [0] * 12, [1] * 32]),
        }
        one = seen(next(iter(Walk(model, [padded]))), advance=False)
        other = seen(next(iter(Walk(model, [{"input_ids": short}, {"input_ids": long}]))), advance=False)
        assert one.keys() == other.keys()
        for label, stat in one.items():
            assert stat.tokens == other[label].tokens, label
            torch.testing.assert_close(stat.norm, other[label].norm, rtol=1e-4, atol=1e-6)

    def test_batches_of_one_and_of_eight_give_the_same_norms(self) -> None:
        model = tiny("llama")
        ids = tokens(model, batch=8, length=24)["input_ids"]
        whole = seen(next(iter(Walk(model, [{"input_ids": ids}]))), advance=False)
        single = seen(next(iter(Walk(model, [{"input_ids": row} for row in ids.split(1)]))), advance=False)
        for label, stat in whole.items():
            torch.testing.assert_close(stat.norm, single[label].norm, rtol=1e-5, atol=1e-6)

    def test_stopping_after_the_last_linear_sees_what_a_whole_forward_sees(self) -> None:
        model = tiny("qwen2_moe")
        data = [tokens(model, seed=seed) for seed in range(3)]
        stopped = seen(next(iter(Walk(model, data))), advance=False)
        whole = seen(next(iter(Walk(model, data))), advance=True)
        for label, stat in stopped.items():
            assert torch.equal(stat.norm, whole[label].norm), label


class TestExperts:
    def test_each_expert_is_weighed_by_the_tokens_it_saw(self) -> None:
        model = tiny("mixtral")
        block = next(iter(Walk(model, [tokens(model, batch=2, length=32)])))
        found = seen(block, advance=False)
        whole = collect_inputs(block, block.linears, NORM, advance=False)
        counts = {label: tokens for label, tokens in whole.scarce.items() if "gate_up_proj" in label}
        counts |= {
            label: stat.tokens
            for label, stat in found.items()
            if "gate_up_proj" in label and label not in whole.scarce
        }
        assert sum(counts.values()) == 2 * 32 * 2  # every token visits two experts
        assert len({stat.norm.sum().item() for label, stat in found.items() if "gate_up" in label}) == 4

    def test_recording_the_experts_changes_no_output(self) -> None:
        model = tiny("qwen3_moe")
        data = [tokens(model)]
        plain, recorded = Walk(model, data), Walk(model, data)
        next(iter(plain)).advance()
        seen(next(iter(recorded)), advance=True)
        torch.testing.assert_close(plain.hidden[0], recorded.hidden[0], rtol=1e-5, atol=1e-6)

    def test_an_expert_that_saw_no_token_is_reported_and_weighed_by_the_others_average(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = tiny("mixtral")
        block = blocks(model)[0][1]
        with torch.no_grad():
            # A router that never chooses expert 3: its logit is far below the others'.
            block.mlp.gate.weight.zero_()
            block.mlp.gate.weight[:3] += 0.01 * torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        block.mlp.gate.register_forward_hook(lambda *_: None)
        router = block.mlp.gate
        original = router.forward

        def never_three(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits, weights, index = original(hidden)
            return logits, weights, torch.where(index == 3, 0, index)

        router.forward = never_three
        with caplog.at_level(logging.WARNING):
            plan = Wanda(skip="1").calibrate(model, [tokens(model)])
        unseen = plan.blocks[0].facts["unseen"]
        assert unseen == [f"model.layers.0.mlp.experts.{name}[3]" for name in ("gate_up_proj", "down_proj")]
        assert "no calibration token reached it" in caplog.text
        down = next(x for x in linears("model.layers.0", block, arch_of(model)) if x.label == unseen[1])
        mask = plan[Key("model.layers.0.block_sparse_moe.experts.3.w2.weight", "mask")]
        reached = seen(next(iter(Walk(model, [tokens(model)]))), advance=False)
        norm = reached[unseen[1]].norm
        assert norm.std() > 0  # the average of the other experts' inputs, not all ones
        lowest = (down.weight.abs() * norm).argsort(dim=1, stable=True)[:, : down.weight.shape[1] // 2]
        assert not mask.gather(1, lowest).any()

    def test_few_tokens_are_filled_up_from_the_average(self) -> None:
        model = tiny("mixtral")
        block = next(iter(Walk(model, [tokens(model, batch=1, length=16)])))
        found = collect_inputs(block, block.linears, frozenset({"gram"}), advance=False)
        few = [label for label in found.scarce if "gate_up_proj" in label]
        assert len(few) == 4  # 32 visits cannot give any of 4 experts the 64 tokens that it has inputs
        assert {found.inputs[label].tokens for label in few} == {64}
        assert sum(found.scarce[label] for label in few) == 2 * 16
        assert all(float(found.inputs[label].gram.trace()) > 0 for label in few)

    def test_a_single_expert_can_be_left_out(self) -> None:
        model = tiny("mixtral")
        plan = Wanda(exclude=[r"gate_up_proj\[2\]"]).calibrate(model, [tokens(model)])
        assert not any("experts.2.w1" in key.name or "experts.2.w3" in key.name for key in plan)
        assert plan.promises is not None
        promised = {name for one in plan.promises.stored for name in one.tensors}
        assert not any("experts.2.w1" in name for name in promised)
        assert any("experts.2.w2" in key.name for key in plan)
        assert any("experts.2.w2" in name for name in promised)


class TestChoosing:
    def test_block_ranges_are_read_in_every_spelling(self) -> None:
        for text in ("0-1,3", ["0-1", 3], ["0", "1", "3"]):
            pruner = Magnitude(skip=text)
            model = nn.Linear(2, 2)
            assert [bool(pruner.target_linears(index, [_linear(model)])) for index in range(5)] == [
                False,
                False,
                True,
                False,
                True,
            ]

    @pytest.mark.parametrize("bad", ["3-1", "a", "1-", "-1", [True], 1.5])
    def test_what_is_no_block_range_is_refused(self, bad: object) -> None:
        with pytest.raises(ValueError, match="skip"):
            Magnitude(skip=bad)

    def test_a_pattern_that_is_no_regular_expression_is_refused(self) -> None:
        with pytest.raises(ValueError, match="pattern"):
            Magnitude(include="[")

    def test_leaving_nothing_to_prune_is_an_error(self) -> None:
        with pytest.raises(UsageError, match="leave no linear"):
            Magnitude(include="nowhere").forecast(tiny("llama"))

    def test_dense_propagation_shows_later_blocks_dense_inputs(self) -> None:
        model = tiny("llama")
        data = [tokens(model)]
        pruned = Wanda(sparsity=0.7).calibrate(model, data)
        dense = Wanda(sparsity=0.7, propagate="dense").calibrate(model, data)
        first = Key("model.layers.0.mlp.up_proj.weight", "mask")
        second = Key("model.layers.1.mlp.up_proj.weight", "mask")
        assert torch.equal(pruned[first], dense[first])
        assert not torch.equal(pruned[second], dense[second])


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'wanda'"):
        find("wadna")


def _linear(module: nn.Linear):
    from structprune.models.arch import Linear

    return Linear("x.weight", "x", module)
