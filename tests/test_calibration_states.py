"""What is noted of a block's states, on its way through a walk."""

import math

import torch

from structprune.calibration.states import angular_distance, last_states, noted_states, token_cosines
from structprune.models.walk import Walk
from tests.tiny import tiny, tokens


def test_by_hand() -> None:
    before = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [9.0, 9.0]]])
    after = torch.tensor([[[4.0, 3.0], [0.0, 2.0], [9.0, 9.0]]])
    real = torch.tensor([[True, True, False]])
    assert torch.allclose(token_cosines(before, after, real), torch.tensor([0.96, 0.0]))
    assert torch.equal(last_states(before, after, real), torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]))
    found = angular_distance(torch.tensor([1.0, 0.0, -1.0, math.cos(0.25 * math.pi)]))
    assert torch.allclose(found, torch.tensor([0.0, 0.5, 1.0, 0.25]))


def test_states_of_a_walk_are_those_of_the_model_without_padding() -> None:
    model = tiny("llama")
    batches = [tokens(model, length=12, seed=seed) for seed in range(2)]
    mask = torch.ones_like(batches[1]["input_ids"])
    mask[0, :5] = mask[1, 9:] = 0
    batches[1]["attention_mask"] = mask
    first = next(iter(walk := Walk(model, batches)))
    with noted_states(first, None) as nothing, noted_states(first, token_cosines) as notes:
        first.advance()
    assert nothing.joined() is None and len(walk.hidden) == 2
    expected = []
    for batch in batches:
        with torch.no_grad():
            before, after, *_ = model(**batch, output_hidden_states=True).hidden_states
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        expected.append(torch.cosine_similarity(before[real], after[real], dim=-1))
    found = notes.joined()
    assert found is not None and torch.allclose(found, torch.cat(expected), atol=1e-6)
