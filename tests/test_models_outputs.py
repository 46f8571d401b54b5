"""The head on slices of the last hidden states gives what the whole model gives, forward and backward."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CohereConfig, Gemma2Config, GPT2Config, OPTConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from structprune.models import outputs
from structprune.models.opening import Opening
from structprune.models.outputs import BodyAndHead, logits, next_tokens, per_token
from structprune.models.streamed import StreamedModel, open_model
from structprune.recovery.objective import losses
from tests.tiny import (
    FAMILIES,
    GROUPED,
    LENGTH,
    SIZES,
    SPECIAL,
    VOCABULARY,
    randomise,
    save_tiny,
    tiny,
    tokens,
)

# Heads that do more than multiply; none of them is drawn so that it is next to a plain product.
HEADS: dict[str, Callable[[], Any]] = {
    "softcap": lambda: Gemma2Config(**GROUPED, final_logit_softcapping=0.5),
    "scale": lambda: CohereConfig(**GROUPED, logit_scale=0.25),
    "projection": lambda: OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=32),
    "tied": lambda: GPT2Config(
        **SPECIAL, vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4
    ),
}
KINDS = [*HEADS, "llava", "qwen2_5_vl", "mixtral"]


def model_of(kind: str, seed: int = 0) -> PreTrainedModel:
    if kind not in HEADS:
        return tiny(kind, seed=seed)
    config = HEADS[kind]()
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    randomise(model, seed)
    found: PreTrainedModel = model.eval()
    return found


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let a slice hold 5 tokens, which divides none of the lengths here."""
    monkeypatch.setattr(outputs, "SLICE_BYTES", 5 * VOCABULARY * 4)
    return 5


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each run of a head was given."""
    seen: list[int] = []
    real = BodyAndHead.head

    def head(self: BodyAndHead, kind: type[Any], states: Tensor) -> Tensor:
        seen.append(len(states))
        return real(self, kind, states)

    monkeypatch.setattr(BodyAndHead, "head", head)
    return seen


@pytest.mark.parametrize("kind", [*FAMILIES, "softcap", "scale", "projection"])
@torch.no_grad()
def test_the_head_on_some_states_gives_the_logits_of_those_tokens(kind: str) -> None:
    model = model_of(kind)
    batch = tokens(model)
    expected = model(**batch).logits
    output = BodyAndHead(model).run(batch)
    assert output.vocabulary == VOCABULARY
    chosen = torch.tensor([3, 17, 18])
    assert torch.allclose(output.head(output.states[1, chosen]), expected[1, chosen], atol=1e-6)
    assert torch.equal(logits(model, batch), expected)
    assert torch.equal(next_tokens(model, batch), expected[:, -1:].argmax(dim=-1))
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_streamed_model_says_the_same_to_the_last_bit(family: str, tmp_path: Path) -> None:
    streamed = open_model(save_tiny(family, tmp_path), Opening(stream=True))
    assert isinstance(streamed, StreamedModel)
    resident = tiny(family)
    batch = tokens(resident)
    assert torch.equal(logits(streamed, batch), logits(resident, batch))
    assert all(tensor.is_meta for tensor in streamed.skeleton.state_dict().values())


@torch.no_grad()
def test_while_the_body_runs_no_logit_is_made() -> None:
    model = tiny("llama")
    made: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *call: made.append(call[2].numel()))
    BodyAndHead(model).run(tokens(model))
    assert made == [0]


def test_a_body_that_fails_leaves_the_model_as_it_was() -> None:
    model = tiny("opt")
    batch = tokens(model)
    expected = logits(model, batch)
    with pytest.raises(IndexError):
        BodyAndHead(model).run({"input_ids": torch.tensor([[VOCABULARY]])})
    assert torch.equal(logits(model, batch), expected)


def test_slices_cover_every_token_once(small_slices: int) -> None:
    seen: list[int] = []

    def measure(numbers: Tensor) -> Tensor:
        seen.append(len(numbers))
        return torch.stack([numbers, -numbers])

    found = per_token(measure, VOCABULARY, torch.arange(12))
    assert found.tolist() == [list(range(12)), [-number for number in range(12)]]
    assert seen == [small_slices, small_slices, 2]


def plainly(
    model: PreTrainedModel, ids: Tensor, teacher: PreTrainedModel | None, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """The two losses as the papers write them, from all logits at once."""
    found: Tensor = model(input_ids=ids).logits
    each = functional.cross_entropy(found[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)
    if teacher is None:
        return each, None
    with torch.no_grad():
        p = (teacher(input_ids=ids).logits / temperature).softmax(dim=-1)
    log_ratio = p.log() - (found / temperature).log_softmax(dim=-1)
    return each, (p * log_ratio).sum(dim=-1).mean() * temperature**2


@pytest.mark.parametrize("taught", [False, True], ids=["alone", "with a teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_plain_formulas(
    kind: str, taught: bool, small_slices: int, widths: list[int]
) -> None:
    model = model_of(kind)
    teacher = model_of(kind, seed=1) if taught else None
    ids = tokens(model, batch=3, length=11)["input_ids"]

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        loss.backward()
        return {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    output = BodyAndHead(model).run({"input_ids": ids})
    with torch.no_grad():
        dense = BodyAndHead(teacher).run({"input_ids": ids}) if teacher is not None else None
    found = losses(output, ids, dense=dense, temperature=2.0)
    each, divergence = plainly(model, ids, teacher, 2.0)
    assert torch.allclose(found.next_token, each, rtol=1e-5)
    assert (found.distillation is None) == (divergence is None)
    ours, expected = found.next_token.mean(), each.mean()
    if found.distillation is not None and divergence is not None:
        assert torch.allclose(found.distillation, divergence, rtol=1e-4)
        ours, expected = ours + 0.5 * found.distillation, expected + 0.5 * divergence
    forward = len(widths)
    mine, plain = gradients(ours), gradients(expected)
    assert mine.keys() == plain.keys()
    assert model.get_output_embeddings().weight.grad is not None
    for name, gradient in plain.items():
        assert torch.allclose(
            mine[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-8
        ), name
    assert max(widths) <= small_slices
    # The backward pass makes every slice once more.
    assert len(widths) == 2 * forward
