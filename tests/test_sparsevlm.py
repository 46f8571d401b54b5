"""SparseVLM: the words that rate, what they pay, and what becomes of tokens that version 1 uses again."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from structprune.pruners.token.sparsevlm import _recycled
from structprune.runtime.view import View
from structprune.solvers.density_peaks import density_peaks
from tests.oracle import column_sets, generate, padding_of, pictures, pruned, token_pruner, worst
from tests.pictures import BLOCKS, IMAGE, vision_model

EXACT, CLOSE = 1e-6, 1e-5


def _block_inputs(model: Any) -> list[list[Tensor]]:
    """Return what every block reads from now on, forward by forward."""
    found: list[list[Tensor]] = [[] for _ in range(BLOCKS)]
    for index, block in enumerate(model.model.language_model.layers):
        block.register_forward_pre_hook(lambda _, args, index=index: found[index].append(args[0]))
    return found


def test_raters_are_the_words_above_the_mean_of_what_tokens_are_most_like() -> None:
    batch = pictures("llava", 2, 1).batch()
    model = vision_model("llava")
    pruner: Any = token_pruner("sparsevlm", target={"tokens": 2})
    with pruned(model, pruner, batch), torch.no_grad():
        inputs = _block_inputs(model)
        cache = model(**batch, use_cache=True).past_key_values
        attention = _eager_rows(batch)
    image = 0
    kept = column_sets(cache.layers[1], torch.zeros(2, dtype=torch.long))
    for row in range(2):
        states, visual = inputs[0][0][row], batch["input_ids"][row].eq(IMAGE)
        real = batch["attention_mask"][row].bool()
        for start in (visual & ~visual.roll(1)).nonzero().flatten().tolist():
            mine = range(start, start + 16)
            words = [place for place in range(start + 16, len(real)) if bool(real[place] & ~visual[place])]
            share = (states[[*mine]] @ states[words].T).softmax(1).mean(0)
            raters = [place for place, one in zip(words, share, strict=True) if one > share.mean()]
            assert 0 < len(raters) < len(words)
            paid = attention[row][raters][:, [*mine]].mean(0)
            # 16 * (2 / 16) ** power of the first stage.
            count = int(16 * (2 / 16) ** pruner.stages(BLOCKS)[1] + 0.5)
            assert {start + one for one in paid.topk(count).indices.tolist()} == {*mine} & {*kept[row]}
            image += 1
    assert image == 3


@torch.no_grad()
def _eager_rows(batch: dict[str, Tensor]) -> Tensor:
    """Return the attention of the first block, mean over heads."""
    found: Tensor = vision_model("llava", attention="eager")(**batch, output_attentions=True).attentions[0]
    return found.mean(1)


def test_clusters_are_where_tokens_are_dense() -> None:
    draw = torch.Generator().manual_seed(0)
    middles = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    features = (middles[:, None] + torch.randn(3, 8, 2, generator=draw) / 4).flatten(0, 1)
    found = density_peaks(features, 3)
    assert [len({*part.tolist()}) for part in found.split(8)] == [1, 1, 1] and len({*found.tolist()}) == 3
    # By hand: 1 and 2 are dense; 0 is the first of two equals, and 9 the farthest from what is denser.
    line = torch.tensor([[0.0], [0.0], [1.0], [9.0]])
    assert density_peaks(line, 1).tolist() == [0, 0, 0, 0]
    assert density_peaks(line, 2, neighbours=1).unique().tolist() == [0, 1]
    equal = torch.ones(6, 3)
    assert density_peaks(equal, 6).sort().values.tolist() == [0, 1, 2, 3, 4, 5]
    assert density_peaks(equal[:1], 1).tolist() == [0]


@pytest.mark.parametrize("keep", [1, 2, 7, 39, 40])
def test_what_is_recycled_is_a_mean_of_some_that_would_go(keep: int) -> None:
    draw = torch.Generator().manual_seed(keep)
    features, ranks = torch.randn(40, 8, generator=draw), torch.randperm(40, generator=draw)
    weights = _recycled(features, ranks, keep)
    stays = weights.any(1)
    assert int(stays.sum()) == keep
    assert torch.allclose(weights.sum(1), stays.float(), atol=EXACT)
    # No token goes into two, and no less of one goes in than of another in the same cluster.
    assert bool((weights > 0).sum(0).le(1).all())
    pool = int(0.3 * (40 - keep)) + 1 if keep < 40 else 0
    clusters = min(pool // 10 + 1, keep - 1) if pool else 0
    used = int((weights > 0).sum())
    assert used == keep - clusters + (pool if clusters else 0)
    assert {*ranks[(weights > 0).any(0)].tolist()} == {*range(used)}
    for row in weights[stays]:
        members = row.nonzero().flatten()
        assert torch.equal(row[members], torch.full((len(members),), 1 / len(members)))
    # The mean stands where the strongest stood.
    for place in stays.nonzero().flatten().tolist():
        assert int(ranks[place]) == int(ranks[weights[place] > 0].min())


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_positions_are_those_of_the_version(version: Literal["v1", "v2"]) -> None:
    pruner = token_pruner("sparsevlm", version=version, positions=None)
    model, batch = vision_model("llava"), pictures("llava", 1).batch()
    drops = [one for one in pruner.drops(pruner.calibrate(model, [batch]), model) if not one.watches]
    assert len(drops) == 3 and all(one.compact == (version == "v1") for one in drops)
    assert not any(
        one.compact
        for one in token_pruner("sparsevlm", version="v1").drops(pruner.calibrate(model, [batch]), model)
    )


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_version_1_is_right_in_a_batch_and_with_a_cache(family: str) -> None:
    prompts = pictures(family)
    model, batch = vision_model(family), prompts.batch()
    with pruned(model, token_pruner("sparsevlm", version="v1", target={"keep_ratio": 0.4}), batch):
        with torch.no_grad():
            together = model(**batch, use_cache=True)
            kept = [column_sets(layer, padding_of(batch)) for layer in together.past_key_values.layers]
            for row, ids in enumerate(prompts.rows):
                alone = model(**prompts.alone(row), use_cache=True)
                assert worst(together.logits[row, -len(ids) :], alone.logits[0]) < CLOSE
                for block, layer in enumerate(alone.past_key_values.layers):
                    assert kept[block][row] == column_sets(layer, torch.zeros(1, dtype=torch.long))[0]
        found = generate(model, batch)
        assert worst(found.logits[0], together.logits[:, -1]) < CLOSE
        # Merged tokens are in the cache: to go on with one token is to go on with what was merged.
        again = generate(model, batch, max_new_tokens=2)
        assert torch.equal(again.sequences, found.sequences[:, : again.sequences.shape[1]])
    with pruned(model, token_pruner("sparsevlm", target={"keep_ratio": 0.4}), batch), torch.no_grad():
        assert not torch.equal(model(**batch).logits, together.logits)


def test_version_1_computes_means_of_clusters_where_the_strongest_stood() -> None:
    batch, seen = pictures("llava", 1).batch(), []
    model = vision_model("llava")
    pruner: Any = token_pruner("sparsevlm", version="v1", target={"tokens": 3})
    kind, merged = type(pruner), []

    class Noting(kind):  # type: ignore[misc, valid-type]
        def merge(self, one: View, chosen: Tensor) -> Tensor | None:
            weights = super().merge(one, chosen)
            seen.append(one)
            merged.append(weights)
            return weights

    with pruned(model, Noting(**pruner.model_dump()), batch), torch.no_grad():
        inputs = _block_inputs(model)
        cache = model(**batch, use_cache=True).past_key_values
    visual = batch["input_ids"][0].eq(IMAGE)
    assert [one.block for one in seen] == [1, 2, 3]
    for one, weights in zip(seen, merged, strict=True):
        places = one.candidates[0].nonzero().flatten()
        stays = places[weights[0].any(1)].tolist()
        kept = column_sets(cache.layers[one.block], padding_of(batch))[0]
        assert stays == [place for place in kept if visual[place]]
        states = inputs[one.block][0][0][[slot for slot, place in enumerate(kept) if visual[place]]]
        expected = (weights[0] @ one.features()[0])[weights[0].any(1)]
        assert torch.allclose(states, expected, atol=CLOSE)
    assert any(bool((weights > 0).sum(2).gt(1).any()) for weights in merged)


def test_what_a_word_costs_is_little_of_a_prefill() -> None:
    from structprune.runtime.flops import BlockCost

    cost, counts = BlockCost(4096, 4096, 4096, 11008), [576] * 3 + [300] * 4 + [200] * 9 + [110] * 16
    pairs = [(one, one) for one in counts]
    plain = token_pruner("sparsevlm").operations(cost, 576, pairs)
    assert plain == 576 * 4096 + (576 + 300 + 200) * 4096
    mixing = token_pruner("sparsevlm", version="v1").operations(cost, 576, pairs) - plain
    # 83, 31 and 28 tokens are compared with one another.
    assert mixing == (83**2 + 31**2 + 28**2) * 4096
    # With 64 words.
    assert (64 * plain + mixing) / (32 * cost.operations(576)) < 0.001
