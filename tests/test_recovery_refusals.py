"""What recovery refuses leaves the model as it was, and says why."""

import copy
import math
import sys

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from structprune.errors import EnvironmentFailure, InputError, QualityError, UsageError
from structprune.recovery.masked_lora import MaskedLayers
from tests.recovering import (
    assert_untouched,
    held_out_loss,
    prune,
    pruned,
    recover,
    trained,
)
from tests.tiny import tiny


@pytest.fixture
def dense() -> PreTrainedModel:
    return trained()


@pytest.mark.parametrize("rate", [1e-30, 1.0])
def test_nothing_that_beats_the_start_is_an_error_of_quality(dense: PreTrainedModel, rate: float) -> None:
    model, masks = pruned(dense)
    with pytest.raises(QualityError, match=r"(no check|nothing before it) beat"):
        recover(model, masks, learning_rate=rate)
    assert_untouched(model, dense)


def test_a_loss_that_is_not_a_number_stops_the_training(
    dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, masks = pruned(dense)
    spoil_after(model, 3, monkeypatch)
    with pytest.raises(QualityError, match="not finite at step 2, and nothing before it beat the start"):
        recover(model, masks)
    assert_untouched(model, dense)


def test_what_was_best_before_the_loss_broke_is_kept(
    dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, masks = pruned(dense)
    before = held_out_loss(model)
    spoil_after(model, 20, monkeypatch)
    recovery = recover(model, masks)
    assert "not finite" in recovery.stopped
    assert recovery.best_step == 10
    monkeypatch.undo()
    assert held_out_loss(model) < before


def spoil_after(model: PreTrainedModel, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every run of the model after the first so many end in states that are NaN."""
    body = model.base_model
    forward, count = body.forward, iter(range(10**6))

    def spoilt(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        if next(count) >= calls:
            output.last_hidden_state = output.last_hidden_state * math.nan
        return output

    monkeypatch.setattr(body, "forward", spoilt)


def test_a_teacher_with_another_vocabulary_is_refused(dense: PreTrainedModel) -> None:
    model, masks = pruned(dense)
    teacher = copy.deepcopy(dense)
    teacher.resize_token_embeddings(400)
    with pytest.raises(InputError, match="400 tokens in its vocabulary, the model 320"):
        recover(model, masks, teacher=teacher)


def test_a_tensor_that_cannot_be_trained_is_named(dense: PreTrainedModel) -> None:
    model, masks = pruned(dense)
    masks["model.embed_tokens.weight"] = torch.ones(320, 64, dtype=torch.bool)
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight belongs to a Embedding"):
        recover(model, masks)


def test_a_linear_layer_that_does_more_than_multiply_is_named() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(InputError, match=r"0\.weight belongs to a Doubling"):
        MaskedLayers(nn.Sequential(Doubling(4, 4)), ["0.weight"], rank=2, alpha=4, ranks={})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("model.nowhere.weight", (4, 4), "does not have"), ("lm_head.weight", (4, 4), r"has shape \[4, 4\]")],
)
def test_a_mask_that_does_not_fit_is_named(
    dense: PreTrainedModel, name: str, shape: tuple[int, int], message: str
) -> None:
    model, _ = pruned(dense)
    with pytest.raises(InputError, match=message):
        recover(model, {name: torch.ones(shape, dtype=torch.bool)})


def test_modules_can_have_ranks_of_their_own(dense: PreTrainedModel) -> None:
    model, masks = pruned(dense)
    recovery = recover(model, masks, rank=4, ranks={r"layers\.1\.self_attn\.[qk]_proj": 2, "down_proj": 6})
    ranks = {name: factors.rank for name, factors in recovery.factors.items()}
    assert ranks.pop("model.layers.1.self_attn.q_proj.weight") == 2
    assert ranks.pop("model.layers.1.self_attn.k_proj.weight") == 2
    assert {ranks.pop(f"model.layers.{block}.mlp.down_proj.weight") for block in (0, 1)} == {6}
    assert set(ranks.values()) == {4}


def test_experts_can_have_ranks_of_their_own() -> None:
    model = tiny("mixtral")
    masks = prune(model, 0.5)
    layers = MaskedLayers(model, list(masks), rank=4, alpha=8, ranks={"experts.down_proj": 2})
    factors = layers.factors()
    assert factors["model.layers.0.mlp.experts.down_proj"].rank == 2
    assert factors["model.layers.0.mlp.experts.gate_up_proj"].rank == 4


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("q_porj", "matches no recovered module"), ("q_proj[", "not a regular expression")],
)
def test_a_rank_pattern_that_reaches_nothing_is_refused(
    dense: PreTrainedModel, pattern: str, message: str
) -> None:
    model, masks = pruned(dense)
    with pytest.raises(UsageError, match=message):
        recover(model, masks, ranks={pattern: 2})
    assert_untouched(model, dense)


def test_a_peft_without_room_for_our_layer_is_named(
    dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, masks = pruned(dense)
    monkeypatch.delattr("peft.LoraConfig._register_custom_module")
    with pytest.raises(EnvironmentFailure, match="peft 0"):
        recover(model, masks)
    assert_untouched(model, dense)


def test_a_missing_peft_is_named(dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = pruned(dense)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EnvironmentFailure, match=r"structprune\[recover\]"):
        recover(model, masks)
    assert_untouched(model, dense)


def test_a_model_without_linear_layers_has_nothing_to_recover(dense: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="nothing can be recovered"):
        recover(pruned(dense)[0], {})
