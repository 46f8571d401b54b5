"""TransPrune: what modules change, added up block by block, and what the question pays, by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from structprune.runtime.attach import attach, detach
from structprune.runtime.drop import Drop
from structprune.runtime.view import View
from tests.oracle import column_sets, longer, pictures, pruned, token_pruner
from tests.pictures import BLOCKS, IMAGE, vision_model
from tests.tiny import CACHE

EXACT = 1e-6


class Scored:
    """Scores as the method does, and keeps what it scored and saw."""

    def __init__(self, pruner: Any) -> None:
        self.pruner = pruner
        self.seen: list[View] = []
        self.newlines, self.tower_layers = pruner.newlines, pruner.tower_layers
        self.scores: list[Tensor] = []

    @classmethod
    def method(cls) -> str:
        return "scored"

    def watch(self, seen: View) -> None:
        """Note what the method notes."""
        self.pruner.watch(seen)

    def merge(self, seen: View, chosen: Tensor) -> None:
        """Keep tokens as they are."""

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        self.seen.append(seen)
        self.scores.append(self.pruner.score(seen))
        chosen: Tensor = self.pruner.choose(seen, keep)
        return chosen


@torch.no_grad()
def _run(batch: dict[str, Tensor], pruner: Any, family: str = "llava") -> Scored:
    model, scored = vision_model(family), Scored(pruner)
    drops = pruner.drops(pruner.calibrate(model, [batch]), model)
    attach(
        model, "scored", [Drop(one.block, False, one.tokens, scored, watches=one.watches) for one in drops]
    )
    model(**batch)
    detach(model)
    return scored


@torch.no_grad()
def _passed(batch: dict[str, Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
    """Return of every block what its two modules read and return, of the model with all its tokens."""
    model, found = vision_model("llava"), [[] for _ in range(BLOCKS)]
    for index, block in enumerate(model.model.language_model.layers):
        block.self_attn.register_forward_hook(
            lambda _, args, kwargs, output, index=index: found[index].append(
                (kwargs["hidden_states"], output[0])
            ),
            with_kwargs=True,
        )
        block.mlp.register_forward_hook(
            lambda _, args, output, index=index: found[index].append((args[0], output))
        )
    model(**batch)
    return found


@pytest.mark.parametrize("compat", [False, True])
def test_a_token_scores_what_modules_change_and_what_the_question_pays(compat: bool) -> None:
    batch = pictures("llava", 1).batch()
    visual = batch["input_ids"][0].eq(IMAGE)
    (read, mixed), (fed, given) = _passed(batch)[0]
    changed = torch.zeros(16)
    for before, after in ((read[0], mixed[0]), (fed[0], given[0])):
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        size = after.norm(dim=-1) / before.norm(dim=-1)
        turn = (1 - cosine if compat else 1 - cosine.abs()).exp()
        changed += size[visual] * turn[visual] / (turn if compat else turn[visual]).sum()
    with torch.no_grad():
        eager = vision_model("llava", attention="eager")(**batch, output_attentions=True).attentions[0][0]
    asking = (~visual).clone()
    asking[: int(visual.nonzero().max())] = False
    asked = eager.mean(0)[asking][:, visual].mean(0)
    scored = _run(batch, token_pruner("transprune", alpha=0.25, compat=compat, target={"tokens": 2}))
    expected = 0.25 * changed / changed.sum() + 0.75 * asked / asked.sum()
    assert torch.allclose(scored.scores[0][0], expected, atol=EXACT)


@pytest.mark.parametrize("compat", [False, True])
def test_a_module_that_returns_what_it_read_changes_by_one_part_of_all(compat: bool) -> None:
    batch = pictures("llava", 1).batch()
    pruner = token_pruner("transprune", compat=compat, target={"tokens": 2})
    (seen, *_) = _run(batch, pruner).seen
    read = torch.randn(1, batch["input_ids"].shape[1], 64, generator=torch.Generator().manual_seed(0))
    found = pruner._variation(seen, read, read)
    # exp(0) / Z, with Z of as many tokens as are weighed together.
    assert torch.allclose(found, torch.full((1, 16), 1 / (read.shape[1] if compat else 16)), atol=EXACT)
    assert torch.allclose(pruner._variation(seen, read, 3 * read), 3 * found, atol=EXACT)
    # Turned round: the same for the paper, a factor of e^2 over the others in the released code.
    place = int(batch["input_ids"][0].eq(IMAGE).nonzero()[4])
    turned = read.clone()
    turned[0, place] *= -1
    moved = pruner._variation(seen, read, turned)
    assert float(moved[0, 4] / moved[0, 3]) == pytest.approx(torch.e**2 if compat else 1, rel=1e-4)
    assert not bool(pruner._variation(seen, read, 0 * read).any())


def test_changes_add_up_over_blocks_and_follow_their_tokens() -> None:
    batch = pictures("llava").batch()
    pruner = token_pruner("transprune", alpha=1.0, target={"tokens": 4})
    scored = _run(batch, pruner)
    assert [seen.block for seen in scored.seen] == [1, 2, 3]
    noted = scored.seen[-1].notes["transition variation"]
    parts = torch.zeros_like(noted)
    for seen in scored.seen:
        changes = torch.stack([pruner._variation(seen, *pair) for pair in seen.passed]).sum(0)
        # What was dropped gets nothing more, what is left gets it at its own place.
        parts += seen.marked(changes)
        assert torch.equal(seen.spread(seen.marked(changes), whole=True), changes)
    assert torch.allclose(parts, noted, atol=EXACT)
    assert [int(seen.left.sum()) for seen in scored.seen] == [48, 3 * 15, 3 * 12]
    last = scored.seen[-1]
    survivors = last.spread(parts, whole=True)
    assert torch.allclose(scored.scores[-1], survivors / survivors.sum(1, keepdim=True), atol=EXACT)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_what_text_pays_is_that_of_an_eager_kernel(family: str) -> None:
    batch = pictures(family, 2, 1).batch()
    with torch.no_grad():
        eager = vision_model(family, attention="eager")(**batch, output_attentions=True).attentions
    (seen, *_) = _run(batch, token_pruner("transprune"), family).seen
    found, one = seen.paid_by_text(), torch.zeros_like(seen.images.after)
    image = 0
    for row in range(2):
        visual, real = batch["input_ids"][row].eq(IMAGE), batch["attention_mask"][row].bool()
        starts = (visual & ~visual.roll(1)).nonzero().flatten().tolist()
        for start in starts:
            end = start + int((~visual[start:]).int().argmax())
            asking = real & ~visual & (torch.arange(len(real)) >= end)
            expected = eager[0][row].mean(0)[asking][:, start:end].mean(0)
            assert torch.allclose(found[image, : end - start], expected, atol=EXACT)
            one[image, int(asking.nonzero()[1 + row])] = True
            single = eager[0][row].mean(0)[one[image]][:, start:end].mean(0)
            assert torch.allclose(seen.paid_by_text(one)[image, : end - start], single, atol=EXACT)
            image += 1
    assert image == len(found) == 3


def test_where_no_text_follows_a_picture_the_last_token_asks() -> None:
    prompts = pictures("llava", 1)
    prompts.rows[0] = prompts.rows[0][: len(prompts.rows[0]) - prompts.rows[0][::-1].index(IMAGE)]
    (seen, *_) = _run(prompts.batch(), token_pruner("transprune")).seen
    assert torch.allclose(seen.paid_by_text(), seen.paid_by_last(), atol=EXACT)


def test_it_goes_on_after_a_second_picture_in_a_later_turn() -> None:
    batch, other = pictures("llava", 1).batch(), pictures("llava", 1)
    turn = torch.tensor([other.rows[0][1:]])
    whole = longer(batch, turn)
    model = vision_model("llava")
    with pruned(model, token_pruner("transprune", target={"tokens": 3}), batch), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        second = model(
            input_ids=turn,
            attention_mask=whole["attention_mask"],
            pixel_values=batch["pixel_values"],
            **{CACHE: cache},
        )
    kept = column_sets(second.past_key_values.layers[-1], torch.zeros(1, dtype=torch.long))[0]
    assert int(whole["input_ids"][0].eq(IMAGE)[kept].sum()) == 6
