"""The backward walk gives what autograd gives on the whole model, sample by sample, and leaves no trace."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from structprune.errors import EnvironmentFailure, InputError, QualityError
from structprune.models import backward as walk
from structprune.models.arch import Linear, arch_of, blocks, linears
from structprune.models.backward import backward
from structprune.models.gradients import GradientMeans
from structprune.models.opening import Opening
from structprune.models.spill import Spilled
from structprune.models.streamed import Batch, Model, open_model
from tests.tiny import save_tiny, tiny, tokens

Norms = dict[str, dict[str, Tensor]]
FAMILIES = ["llama", "qwen3", "gemma2", "gpt2", "opt", "gpt_neox", "phi3", "mixtral", "qwen2_moe"]


def norms_of(model: Model, batches: list[Batch]) -> Norms:
    """Return l1 and l2 of every linear by label, blocks from last to first."""
    return {
        label: {"l1": sums.l1, "l2": sums.l2}
        for _, gradients in backward(model, batches)
        for label, sums in gradients.items()
    }


def by_autograd(model: PreTrainedModel, samples: Iterable[Tensor]) -> Norms:
    """Return the same from one backward pass of the whole model per sample of token ids, shape [tokens]."""
    arch = arch_of(model)
    found = [linear for prefix, block in blocks(model, arch) for linear in linears(prefix, block, arch)]
    gradients: dict[str, list[Tensor]] = {linear.label: [] for linear in found}
    for ids in samples:
        model.zero_grad()
        logits = model(input_ids=ids[None], use_cache=False).logits
        loss: Any = functional.cross_entropy(logits[0, :-1].float(), ids[1:])
        loss.backward()
        for linear in found:
            gradients[linear.label].append(gradient_of(linear).clone())
    model.zero_grad()
    return {
        label: {
            "l1": torch.stack(each).abs().mean(dim=0),
            "l2": torch.stack(each).square().mean(dim=0).sqrt(),
        }
        for label, each in gradients.items()
    }


def gradient_of(linear: Linear) -> Tensor:
    gradient = linear.module.get_parameter(linear.parameter).grad
    assert gradient is not None
    return linear.view(gradient).float()


def assert_close(found: Norms, expected: Norms, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for label, norms in expected.items():
        for norm, value in norms.items():
            error = (found[label][norm] - value).norm() / value.norm().clamp_min(1e-30)
            assert error < tolerance, (label, norm, float(error))
            # A single element may sit where two large numbers cancel: there the matrix sets the measure.
            assert (found[label][norm] - value).abs().max() < tolerance * value.max() + 1e-30, (label, norm)


def assert_equal(found: Norms, expected: Norms) -> None:
    assert found.keys() == expected.keys()
    assert all(found[label][norm].equal(expected[label][norm]) for label in expected for norm in ("l1", "l2"))


def padded(ids: Tensor, lengths: list[int], *, left: bool = False) -> Batch:
    """Return samples cut to lengths and padded with a token that would show if it were read."""
    batch = {"input_ids": torch.full_like(ids, 7), "attention_mask": torch.zeros_like(ids)}
    for row, length in enumerate(lengths):
        place = slice(-length, None) if left else slice(length)
        batch["input_ids"][row, place] = ids[row, :length]
        batch["attention_mask"][row, place] = 1
    return batch


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norms_are_those_of_autograd_on_the_whole_model(family: str) -> None:
    model = tiny(family)
    ids = tokens(model, batch=4, length=24)["input_ids"]
    found = norms_of(model, [{"input_ids": ids[:3]}, {"input_ids": ids[3:]}])
    assert_close(found, by_autograd(model, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_and_a_resident_model_give_the_same_bits(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path)
    resident, streamed = open_model(folder), open_model(folder, Opening(stream=True))
    batch = {"input_ids": tokens(tiny(family), batch=2, length=12)["input_ids"]}
    assert_equal(norms_of(streamed, [batch]), norms_of(resident, [batch]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_how_samples_are_batched_does_not_matter(family: str) -> None:
    model = tiny(family)
    ids = tokens(model, batch=4, length=16)["input_ids"]
    alone = norms_of(model, [{"input_ids": row[None]} for row in ids])
    assert_close(norms_of(model, [{"input_ids": ids}]), alone)


@pytest.mark.parametrize(
    ("family", "left"),
    [
        ("llama", False),
        ("llama", True),
        ("gemma2", False),
        ("gpt2", False),
        ("opt", True),
        ("qwen2_moe", False),
    ],
)
def test_padding_is_as_if_it_were_not_there(family: str, left: bool) -> None:
    model = tiny(family)
    ids, lengths = tokens(model, batch=3, length=20)["input_ids"], [20, 13, 6]
    found = norms_of(model, [padded(ids, lengths, left=left)])
    assert_close(found, by_autograd(model, [row[:length] for row, length in zip(ids, lengths, strict=True)]))


def test_samples_given_twice_change_nothing() -> None:
    model = tiny("llama")
    batch = tokens(model, batch=3, length=16)
    assert_close(norms_of(model, [batch, batch]), norms_of(model, [batch]), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_near_single_precision(dtype: torch.dtype) -> None:
    half = tiny("llama", dtype=dtype)
    whole = tiny("llama")
    whole.load_state_dict(half.state_dict())
    ids = tokens(half, batch=2, length=24)["input_ids"]
    found = norms_of(half, [{"input_ids": ids}])
    assert {norm.dtype for norms in found.values() for norm in norms.values()} == {torch.float32}
    assert_close(found, by_autograd(whole, ids), 0.1 if dtype == torch.bfloat16 else 0.01)


def test_gradients_below_the_range_of_float16_are_not_lost() -> None:
    half, whole = tiny("llama", dtype=torch.float16), tiny("llama")
    with torch.no_grad():
        for name in ("model.norm.weight", "lm_head.weight"):
            half.get_parameter(name).mul_(1e-3)
    whole.load_state_dict(half.state_dict())
    ids = tokens(half, batch=2, length=24)["input_ids"]
    expected = by_autograd(whole, ids)
    label = "model.layers.0.mlp.up_proj"
    assert not by_autograd(half, ids)[label]["l1"].any()
    assert_close(norms_of(half, [{"input_ids": ids}]), expected, 0.02)


def test_the_norms_of_a_weight_worked_out_by_hand() -> None:
    sums = GradientMeans(torch.empty(1, 2), samples=4)
    sums.add(torch.tensor([[3.0, -1.0]]))
    sums.add(torch.tensor([[-4.0, 1.0]]))
    assert sums.l1.tolist() == [[7 / 4, 2 / 4]]
    assert sums.l2.tolist() == [[2.5, pytest.approx(0.5**0.5)]]


def test_only_the_norm_that_was_asked_for_is_kept() -> None:
    model = tiny("llama")
    batch = tokens(model, batch=2, length=8)
    expected = norms_of(model, [batch])
    for _, gradients in backward(model, [batch], means=("l1",)):
        for label, sums in gradients.items():
            assert sums.l1.equal(expected[label]["l1"])
            with pytest.raises(KeyError):
                _ = sums.l2


def test_blocks_come_last_to_first_and_take_their_gradients_with_them(tmp_path: Path) -> None:
    model = open_model(save_tiny("llama", tmp_path), Opening(stream=True))
    seen: list[tuple[str, dict[str, GradientMeans]]] = []
    for block, gradients in backward(model, [tokens(tiny("llama"), length=8)]):
        assert not any(gradients_before for _, gradients_before in seen)
        assert list(gradients) == [linear.label for linear in block.linears]
        assert all(linear.weight.shape == gradients[linear.label].l1.shape for linear in block.linears)
        assert not any(linear.weight.is_meta for linear in block.linears)
        seen.append((block.prefix, gradients))
    assert [prefix for prefix, _ in seen] == ["model.layers.1", "model.layers.0"]


def state_of(model: nn.Module) -> list[object]:
    return [
        (name, parameter.requires_grad, parameter.grad, parameter.detach().clone().view(torch.int32).tolist())
        for name, parameter in model.named_parameters()
    ] + [
        (name, len(module._forward_hooks), "forward" in vars(module))
        for name, module in model.named_modules()
    ]


def with_mixed_flags(family: str) -> PreTrainedModel:
    model = tiny(family)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    return model


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_model_is_left_as_it_was(family: str) -> None:
    model = with_mixed_flags(family)
    before = state_of(model)
    norms_of(model, [tokens(model, length=8)])
    assert state_of(model) == before


@pytest.mark.parametrize("where", ["_forward", "_loss_gradient", "_scale", "_finite"])
def test_an_error_leaves_the_model_as_it_was_and_no_file(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_mixed_flags("mixtral")
    before = state_of(model)

    def broken(*_: object) -> None:
        assert list(tmp_path.iterdir())
        raise RuntimeError("broken")

    monkeypatch.setattr(walk, where, broken)
    with pytest.raises(RuntimeError, match="broken"):
        next(backward(model, [tokens(model, length=8)], folder=tmp_path))
    assert not list(tmp_path.iterdir())
    assert state_of(model) == before


def stop_early(folder: Path) -> None:
    model = tiny("llama")
    for _ in backward(model, [tokens(model, length=8)], folder=folder):
        assert list(folder.iterdir())
        raise KeyError("of the caller")


def finish(folder: Path) -> None:
    model = tiny("llama")
    for _ in backward(model, [tokens(model, length=8)], folder=folder):
        assert list(folder.iterdir())
    raise KeyError("at the end")


@pytest.mark.parametrize("run", [stop_early, finish])
def test_the_spilled_files_are_removed_however_the_walk_ends(
    run: Callable[[Path], None], tmp_path: Path
) -> None:
    with pytest.raises(KeyError):
        run(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_sample_without_a_next_token_is_refused() -> None:
    model = tiny("llama")
    batch = padded(tokens(model, batch=2, length=8)["input_ids"], [8, 1])
    with pytest.raises(InputError, match="no token to predict"):
        next(backward(model, [batch]))


def test_no_samples_are_refused() -> None:
    with pytest.raises(InputError, match="no samples"):
        next(backward(tiny("llama"), []))


def test_a_batch_with_images_is_refused() -> None:
    model = tiny("llava")
    with pytest.raises(InputError, match="pixel_values"):
        next(backward(model, [tokens(model) | {"pixel_values": torch.zeros(2, 3, 16, 16)}]))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_vision_language_model_is_walked_with_text(family: str) -> None:
    model = tiny(family)
    ids = tokens(model, batch=2, length=12)["input_ids"]
    assert_close(norms_of(model, [{"input_ids": ids}]), by_autograd(model, ids))


def test_a_linear_that_is_run_twice_is_refused() -> None:
    model = tiny("llama")
    mlp = model.get_submodule("model.layers.1.mlp")
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(forward(hidden))
    with pytest.raises(InputError, match=r"gate_proj: .*once"):
        next(backward(model, [tokens(model, length=8)]))


def test_gradients_that_are_not_finite_are_refused() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[5, 5] = torch.inf
    with pytest.raises(QualityError, match="head: the gradient is not finite"):
        next(backward(model, [tokens(model, length=8)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_spilled_tensors_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    spilled = Spilled(tmp_path / "spill")
    first, second = torch.arange(12).view(3, 4).to(dtype), torch.arange(5).to(dtype)
    spilled.append(first.T)
    spilled.append(first)
    spilled[0] = second
    assert len(spilled) == 2
    assert spilled[0].equal(second)
    assert spilled[1].equal(first)
    assert spilled[0] is not spilled[0]
    spilled.remove()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_an_error_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    model = tiny("llama")
    with pytest.raises(EnvironmentFailure, match="file"):
        next(backward(model, [tokens(model, length=8)], folder=tmp_path / "file"))
