"""What decides between dense and sparse kernels; the kernels need a GPU and are stood in for here."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import structprune
from structprune.checkpoint.accelerate import (
    ROWS,
    Decision,
    SemiStructuredLinear,
    Times,
    accelerate,
    choose,
    compress,
    decisions_of,
    difference,
    holds,
    time_both,
    unable,
)
from structprune.errors import UsageError
from structprune.models.opening import Opening
from structprune.models.outputs import logits
from tests.tiny import save_tiny, tiny, tokens


def times(*gains: float) -> Times:
    """Return times by how many times faster sparse is, from the fewest rows to the most."""
    rows = ROWS[: len(gains)]
    return Times(dict.fromkeys(rows, 1.0), {row: 1 / gain for row, gain in zip(rows, gains, strict=True)})


def pruned(family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Return a tiny model whose linears hold 2:4, but for one."""
    model = tiny(family, dtype=dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "layers" in name and "layers.1.mlp.up_proj" not in name:
            parameter.data.view(-1, 4)[:, 1:3] = 0
    return model


class TestChoose:
    def test_faster_everywhere_is_always_sparse(self) -> None:
        assert choose(times(1.5, 1.5, 1.5, 1.5, 1.5, 1.5))[0] == 0

    def test_slower_at_the_most_rows_is_never_sparse(self) -> None:
        chosen, reason = choose(times(1.5, 1.5, 1.5, 1.5, 1.5, 0.9))
        assert chosen is None
        assert "4096: 0.90x" in reason

    def test_what_was_measured_elsewhere_64_rows_slower_and_1280_faster(self) -> None:
        assert choose(times(0.5, 0.5, 0.59, 0.68, 1.35, 1.6))[0] == 1024

    def test_a_gap_of_slower_rows_in_between_is_not_jumped(self) -> None:
        assert choose(times(1.5, 1.5, 1.5, 0.9, 1.2, 1.2))[0] == 1024

    def test_a_gain_within_the_noise_is_none(self) -> None:
        assert choose(times(1.04, 1.04, 1.04, 1.04, 1.04, 1.04))[0] is None

    def test_a_kernel_that_refuses_stays_dense_with_its_reason(self) -> None:
        assert choose(Times({}, {}, "shape is not supported")) == (None, "shape is not supported")

    def test_the_order_in_which_rows_were_measured_does_not_matter(self) -> None:
        dense = {4096: 1.0, 1: 1.0, 64: 1.0}
        assert choose(Times(dense, {1: 2.0, 4096: 0.5, 64: 0.5}))[0] == 64


class TestSemiStructuredLinear:
    def test_few_rows_run_dense_and_many_sparse(self) -> None:
        dense, sparse = torch.ones(3, 4), torch.full((3, 4), 2.0)
        linear = SemiStructuredLinear(dense, sparse, torch.ones(3), 6)
        assert linear(torch.ones(5, 4)).unique().tolist() == [5]
        assert linear(torch.ones(2, 3, 4)).unique().tolist() == [9]  # 6 rows
        assert linear(torch.ones(2, 3, 4)).shape == (2, 3, 3)
        assert linear(torch.ones(4)).shape == (3,)

    def test_a_second_copy_is_not_in_the_state_dict(self) -> None:
        linear = SemiStructuredLinear(torch.ones(3, 4), torch.ones(3, 4), None, 6)
        assert list(linear.state_dict()) == ["weight"]

    def test_without_a_dense_weight_every_call_is_sparse(self) -> None:
        linear = SemiStructuredLinear(None, torch.full((3, 4), 2.0), None, 0)
        assert linear(torch.ones(1, 4)).unique().tolist() == [8]


class TestAccelerate:
    def test_the_pattern_decides_who_may_and_the_times_who_does(self, caplog) -> None:
        model = pruned()
        before = logits(model, tokens(model))
        measured: list[tuple[int, ...]] = []

        def measure(weight: Tensor, convert: object) -> Times:
            measured.append(tuple(weight.shape))
            return times(2, 2, 2, 2, 2, 2) if weight.shape == (64, 64) else times(0.5, 0.5, 2, 2, 2, 2)

        with caplog.at_level(logging.INFO, "structprune"):
            accelerate(model, convert=torch.clone, measure=measure)
        # Each shape once, however many linears have it.
        assert sorted(measured) == [(32, 64), (64, 64), (64, 96), (96, 64)]
        found = {one.label: one for one in decisions_of(model)}
        assert len(found) == 14
        assert found["model.layers.1.mlp.up_proj"] == Decision(
            "model.layers.1.mlp.up_proj", None, "does not hold 2:4"
        )
        assert found["model.layers.0.self_attn.q_proj"].from_rows == 0
        assert found["model.layers.0.mlp.down_proj"].from_rows == 64
        assert isinstance(model.get_submodule("model.layers.1.mlp.up_proj"), nn.Linear)
        down = model.get_submodule("model.layers.0.mlp.down_proj")
        assert isinstance(down, SemiStructuredLinear) and down.from_rows == 64
        assert torch.equal(logits(model, tokens(model)), before)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert "sparse from 64 rows" in caplog.text and "does not hold 2:4" in caplog.text

    def test_nothing_faster_leaves_the_model_and_warns(self, caplog) -> None:
        model = pruned()
        accelerate(model, convert=torch.clone, measure=lambda *_: times(*[0.5] * len(ROWS)))
        assert not any(isinstance(module, SemiStructuredLinear) for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert "sparse measured no faster" in caplog.text

    @pytest.mark.parametrize(
        ("family", "dtype", "said"),
        [
            ("llama", torch.float32, "open the model in bfloat16"),
            ("gpt2", torch.bfloat16, r"kept as \[in, out\]"),
            ("mixtral", torch.bfloat16, "experts are multiplied together"),
        ],
    )
    def test_what_no_kernel_takes_is_no_error(self, family: str, dtype: torch.dtype, said: str) -> None:
        model = pruned(family, dtype)
        accelerate(model, convert=torch.clone, measure=lambda *_: times(*[2.0] * len(ROWS)))
        assert any(said.replace("\\", "") in one.reason for one in decisions_of(model))

    def test_a_shape_that_the_kernels_refuse_is_no_error(self) -> None:
        model = pruned()
        accelerate(model, convert=compress)  # on the CPU PyTorch itself refuses every shape
        assert all(one.from_rows is None for one in decisions_of(model))
        reasons = {one.reason for one in decisions_of(model)} - {"does not hold 2:4"}
        assert all("CUDA" in reason for reason in reasons)

    def test_a_product_that_is_off_stays_dense(self) -> None:
        weight = torch.zeros(32, 64, dtype=torch.bfloat16)
        weight.view(-1, 4)[:, :2] = 1
        found = time_both(weight, lambda own: own * 1.1)
        assert choose(found)[0] is None
        assert "off by" in found.problem

    def test_rounding_is_no_difference(self) -> None:
        value, weight = torch.randn(8, 64), torch.randn(32, 64)
        exact = functional.linear(value, weight)
        assert difference(exact.bfloat16(), exact) == ""
        assert difference(exact.roll(1), exact) != ""

    def test_the_pattern_is_looked_for_in_every_group(self) -> None:
        weight = torch.zeros(2, 8)
        weight[1, 4:6] = 1
        assert holds(weight)
        weight[1, 7] = 1
        assert not holds(weight)
        assert not holds(torch.zeros(2, 6))


class TestLoad:
    def test_on_the_cpu_the_model_stays_dense_and_a_warning_says_why(self, tmp_path: Path, caplog) -> None:
        save_tiny("llama", tmp_path, dtype=torch.bfloat16)
        here = Opening(device="cpu")
        model, tokenizer = structprune.load(tmp_path, here, accelerate="2:4")
        plain, _ = structprune.load(tmp_path, here)
        assert tokenizer is not None
        assert torch.equal(logits(model, tokens(plain)), logits(plain, tokens(plain)))
        assert "nothing gets faster" in caplog.text and "'cpu'" in caplog.text
        assert decisions_of(model) == ()

    def test_other_values_and_streaming_are_refused_before_anything_is_opened(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="1:4"):
            structprune.load(tmp_path / "nowhere", accelerate="1:4")
        with pytest.raises(UsageError, match="streamed"):
            structprune.load(tmp_path / "nowhere", opening=Opening(stream=True), accelerate="2:4")

    @pytest.mark.parametrize(("capability", "able"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
    def test_cards_before_ampere_have_no_such_kernels(
        self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], able: bool
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert (unable(torch.device("cuda")) == "") == able
