"""The solvers of token pruners: tokens far apart against brute force, a fit against what it promises."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprune.pruners.token.fitprune import FitPrune
from structprune.runtime.attach import attach, detach
from structprune.runtime.drop import Drop
from structprune.runtime.flops import BlockCost
from structprune.solvers.farthest import farthest
from structprune.solvers.token_fit import ROUNDS, Fit, deletable, fit_shares
from tests.oracle import column_sets, pictures, pruned, token_pruner
from tests.pictures import BLOCKS, IMAGE, vision_model


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _picks(features: Tensor, keep: int) -> list[int]:
    """Return what is picked of one image."""
    found = farthest(features[None], torch.ones(1, len(features), dtype=torch.bool), torch.tensor([keep]))
    assert int(found.sum()) == keep
    return found[0].nonzero().flatten().tolist()


def _distances(features: Tensor) -> Tensor:
    unit = nn.functional.normalize(features, dim=-1)
    return 1 - unit @ unit.T


def _least(distances: Tensor, picks: Any) -> float:
    return min(float(distances[one, other]) for one, other in combinations(picks, 2))


def _naive(features: Tensor, keep: int) -> list[int]:
    """Pick as the paper writes it: every time the minimum over all that were picked, O(keep^2 N)."""
    distances = _distances(features)
    count = len(features)
    nearest = [
        min(float(distances[one, other]) for other in range(count) if other != one) for one in range(count)
    ]
    picks = [nearest.index(max(nearest))]
    while len(picks) < keep:
        left = [one for one in range(count) if one not in picks]
        far = [min(float(distances[one, pick]) for pick in picks) for one in left]
        picks.append(left[far.index(max(far))])
    return sorted(picks)


def test_three_tokens_on_a_circle_by_hand() -> None:
    angles = torch.tensor([0.0, 10.0, 100.0, 200.0, 205.0]) * math.pi / 180
    features = torch.stack([angles.cos(), angles.sin()], 1)
    # 100 degrees is 90 from its nearest, the others 10 or 5; then 205 is 105 from it and 0 is 100; then 0.
    assert [_picks(features, keep) for keep in (1, 2, 3)] == [[2], [2, 4], [0, 2, 4]]
    # Length says nothing.
    assert _picks(features * torch.tensor([[9.0], [1.0], [0.1], [2.0], [5.0]]), 3) == [0, 2, 4]


def test_picks_are_those_of_the_naive_form_and_begin_those_of_more() -> None:
    for seed in range(5):
        features = _drawn(30, 6, seed=seed)
        before: set[int] = set()
        for keep in range(1, 16):
            picks = _picks(features, keep)
            assert picks == _naive(features, keep)
            assert before < {*picks}
            before = {*picks}


def test_greedy_picks_are_at_least_half_as_far_apart_as_the_best() -> None:
    for seed in range(20):
        features = _drawn(10, 5, seed=seed)
        # The cosine distance is no metric; the chord between directions is, and grows with it.
        chord = (2 * _distances(features).clamp(min=0)).sqrt()
        best = max(_least(chord, picks) for picks in combinations(range(10), 4))
        assert _least(chord, _picks(features, 4)) >= best / 2


def test_of_tokens_that_are_there_twice_every_one_is_kept_once() -> None:
    singles = _drawn(50, 16)
    features = singles.repeat(2, 1)[torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    picks = features[_picks(features, 50)]
    assert len(picks.unique(dim=0)) == 50
    # Also when there are no more distinct ones: none is picked twice.
    assert len(_picks(features, 80)) == 80
    assert _picks(torch.zeros(6, 3), 4) == [0, 1, 2, 3]


def test_picks_are_farther_apart_than_any_random_set() -> None:
    centres = _drawn(64, 32)
    features = centres.repeat_interleave(9, 0) + 0.5 * _drawn(576, 32, seed=1)
    distances = _distances(features)
    generator = torch.Generator().manual_seed(2)

    def least(picks: Any) -> float:
        part = distances[picks][:, picks].fill_diagonal_(torch.inf)
        return float(part.min())

    random = [least(torch.randperm(576, generator=generator)[:64]) for _ in range(500)]
    assert least(_picks(features, 64)) > 1.5 * max(random)


def test_images_side_by_side_are_as_alone() -> None:
    sizes, keep = [12, 1, 7], [4, 1, 7]
    features, real = torch.zeros(3, 12, 8), torch.zeros(3, 12, dtype=torch.bool)
    for image, size in enumerate(sizes):
        features[image, :size], real[image, :size] = _drawn(size, 8, seed=image), True
    found = farthest(features, real, torch.tensor(keep))
    for image, (size, count) in enumerate(zip(sizes, keep, strict=True)):
        assert found[image].nonzero().flatten().tolist() == _picks(features[image, :size], count)
    assert not bool(farthest(features, real, torch.tensor([0, 0, 0])).any())


def test_the_least_go_while_the_rest_keep_their_share() -> None:
    scores = torch.tensor([4.0, 1.0, 2.0, 3.0])
    # Of 10 in all: without 1 there are 9, without 1 and 2 there are 7, without 1, 2 and 3 there are 4.
    assert deletable(scores, 10, 0.05).tolist() == [False] * 4
    assert deletable(scores, 10, 0.1).tolist() == [False] * 4  # one could go, less one for safety
    assert deletable(scores, 10, 0.35).tolist() == [False, True, False, False]
    assert deletable(scores, 10, 0.7).tolist() == [False, True, True, False]
    assert deletable(scores, 10, 1).tolist() == [False, True, True, True]
    # What earlier blocks took away counts: only 10 of 12 are left.
    assert deletable(scores, 12, 0.35).tolist() == [False] * 4


@contextmanager
def _fit(family: str, pruner: FitPrune, batches: list[dict[str, Tensor]]) -> Iterator[tuple[Fit, Any]]:
    """Yield a fit whose images are measured, and what walks over them."""
    model = vision_model(family)
    fit = Fit(BLOCKS, *pruner._costs(model, BLOCKS), newlines=pruner.newlines)
    attach(model, "fit", [Drop(index, True, None, fit) for index in range(BLOCKS)])

    @torch.no_grad()
    def walk() -> None:
        for batch in batches:
            fit.begin_batch()
            model(**batch)

    walk()
    yield fit, walk
    detach(model)


def _fitprune(**fields: Any) -> FitPrune:
    found = token_pruner("fitprune", **fields)
    assert isinstance(found, FitPrune)
    return found


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_more_goes_the_more_attention_may_be_lost(family: str) -> None:
    batches = [pictures(family).batch(), pictures(family, 1).batch()]
    # A target that nothing reaches, so that every walk goes through all blocks.
    with _fit(family, _fitprune(target={"tokens": 1}), batches) as (fit, walk):
        assert len(fit.images) == 4
        totals = []
        for alpha in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0):
            fit.begin(alpha)
            walk()
            totals.append([sum(image.deleted) for image in fit.images])
        assert totals[0] == [0] * 4
        for less, more in pairwise(totals):
            assert all(one <= other for one, other in zip(less, more, strict=True))
        assert min(totals[-1]) > 0
        assert all(image.left >= 1 and image.left == image.size - sum(image.deleted) for image in fit.images)


class _Watched(Fit):
    """A fit that remembers what the kept tokens of each image receive, as a share of what all received."""

    def choose(self, seen: Any, keep: Tensor) -> Tensor:
        block = self._block
        chosen = super().choose(seen, keep)
        if self.alpha is not None:
            for number, image in enumerate(self._batch):
                own, text = (float(one[number][chosen[number]].sum()) for one in seen.received)
                if image.deleted[-1]:
                    self.shares_kept.append((own / image.own[block], text / image.text[block]))
        return chosen

    shares_kept: list[tuple[float, float]]


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.6])
def test_kept_tokens_keep_their_share_of_attention(alpha: float) -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    costs = _fitprune(target={"tokens": 1})._costs(model, BLOCKS)
    fit = _Watched(BLOCKS, *costs, newlines="compete")
    fit.shares_kept = []
    attach(model, "fit", [Drop(index, True, None, fit) for index in range(BLOCKS)])
    with torch.no_grad():
        for step in (None, alpha):
            fit.begin(step)
            fit.begin_batch()
            model(**batch)
    detach(model)
    assert fit.shares_kept
    assert all(min(pair) >= 1 - alpha - 1e-6 for pair in fit.shares_kept)
    # The safety is one token, not many: some share comes close to what is allowed.
    assert min(map(min, fit.shares_kept)) < 1 - alpha / 3


@pytest.mark.parametrize(
    ("target", "slack"),
    [
        ({"visual_flops": 0.6}, 1 / 16),
        ({"tokens": 5}, 1),
        ({"keep_ratio": 0.4}, 1 / 16),
        ({"avg_tokens": 10}, 1),
    ],
)
def test_a_fit_reaches_its_target_within_the_rounding(target: dict[str, float], slack: float) -> None:
    model = vision_model("llava")
    name, wanted = next(iter(target.items()))
    plan = _fitprune(target=target).calibrate(
        model, [pictures("llava").batch(), pictures("llava", 1, 1).batch()]
    )
    # Whole tokens, of the mean of all images and rounded to what is left rather than to what goes.
    assert wanted * 0.6 < plan.facts[name] <= wanted + slack


def test_a_fit_takes_the_least_alpha_that_is_enough() -> None:
    pruner = _fitprune(target={"visual_flops": 0.6})
    with _fit("llava", pruner, [pictures("llava").batch()]) as (fit, walk):
        rounds: list[float | None] = []
        shares = fit_shares(fit, lambda: rounds.append(fit.alpha) or walk())
        # [0, 1] halved until it is narrower than 0.01.
        assert len(rounds) == ROUNDS == 7 and rounds[0] == 0.5
        assert shares == sorted(shares, reverse=True) and len(shares) == BLOCKS
        assert all(share * 16 == round(share * 16) for share in shares)


def test_tokens_that_may_not_go_count_in_a_fit() -> None:
    model, batch = vision_model("llava_next"), pictures("llava_next").batch()
    pruner = _fitprune(target={"keep_ratio": 0.5}, newlines="protect")
    with _fit("llava_next", pruner, [batch]) as (fit, walk):
        # The whole picture of 16 patches, and its tiles with a newline a line.
        assert [image.size for image in fit.images] == [16 + 8 * 5, 16 + 8 * 9, 16 + 4 * 9]
        fit.begin(1.0)
        walk()
        ends = [8, 8, 4]
        assert all(image.left >= least for image, least in zip(fit.images, ends, strict=True))
    with pruned(model, pruner, batch), torch.no_grad():
        layer = model(**batch, use_cache=True).past_key_values.layers[-1]
    kept = sum(
        int(batch["input_ids"][row][there].eq(IMAGE).sum())
        for row, there in enumerate(column_sets(layer, torch.zeros(3, dtype=torch.long)))
    )
    # Of what enters the last block, which may delete more.
    assert 0.4 < kept / sum(image.size for image in fit.images) < 0.75


def test_images_of_different_sizes_give_shares() -> None:
    model, batch = vision_model("qwen2_5_vl"), pictures("qwen2_5_vl").batch()
    sizes = {16 * 2, 16}
    plan = _fitprune(target={"keep_ratio": 0.5}).calibrate(model, [batch])
    left = [float(plan[key]) for key in plan]
    assert sizes and 0.3 < left[-1] < 0.55 and left == sorted(left, reverse=True)
    assert BlockCost.of(model.config).operations(1) == 30848


class _Killed(Exception):
    pass


def _fitted(folder: Path, *, most: int = 10**6) -> tuple[int, list[tuple[int, int]]]:
    """Fit into a folder, stopped before so many forwards; return the forwards made and what was told."""
    model = vision_model("qwen2_5_vl")
    # Of different sizes, and one without any.
    batches = [
        pictures("qwen2_5_vl").batch(),
        pictures("qwen2_5_vl", 0).batch(),
        pictures("qwen2_5_vl", 1).batch(),
    ]
    told: list[tuple[int, int]] = []
    made = 0

    def count(*_: object) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise _Killed

    def tell(stage: str, done: int, total: int) -> None:
        if stage == "measure fitprune":
            told.append((done, total))

    model.register_forward_pre_hook(count)
    pruner = _fitprune(target={"keep_ratio": 0.5})
    with suppress(_Killed):
        pruner.calibrate(model, batches, pruner.writer(folder, model, "0" * 64, tell))
    return min(made, most), told


def test_a_fit_that_was_killed_goes_on_after_its_last_batch(tmp_path: Path) -> None:
    all_made, told = _fitted(tmp_path / "once")
    assert told[0] == (0, 24) and told[-1] == (24, 24) and all_made == 24
    made = 0
    # In the first walk, in a later one, and between two.
    for most in (2, 8, 5):
        more, _ = _fitted(tmp_path / "often", most=most)
        made += more
        assert len([*(tmp_path / "often").glob("fit-*.safetensors")]) == made
        assert not (tmp_path / "often" / "plan.json").exists()
    more, told = _fitted(tmp_path / "often")
    assert made + more == all_made and told[-1] == (24, 24)
    files = [{one.name: one.read_bytes() for one in folder.iterdir()} for folder in tmp_path.iterdir()]
    assert files[0] == files[1] and len(files[0]) == BLOCKS + 1
    # What is decided is not looked at again.
    (tmp_path / "often" / "plan.json").unlink()
    assert _fitted(tmp_path / "often")[0] == 0
    assert (tmp_path / "often" / "plan.json").read_bytes() == (tmp_path / "once" / "plan.json").read_bytes()
