"""The factorisation starts at NoWag-P, never gets worse, and its parts multiply to what it says."""

import pytest
import torch
from torch import Tensor

from structprune.decide import select
from structprune.errors import QualityError, UsageError
from structprune.solvers.armor.descent import ArmorFactors, ArmorSearch, factorise_weight
from structprune.solvers.nowag import importance, normalise_weight


def layer(out: int = 64, inputs: int = 64, *, tokens: int = 256, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a weight and correlated inputs [tokens, in] of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs // 4, inputs, generator=draw) * torch.randn(inputs, generator=draw).exp()
    latent = torch.randn(tokens, inputs // 4, generator=draw)
    noise = 0.1 * torch.randn(tokens, inputs, generator=draw)
    return torch.randn(out, inputs, generator=draw), latent @ mixing + noise


def nowag_loss(weight: Tensor, norm: Tensor, pattern: tuple[int, int]) -> float:
    """NoWag-P's relative loss, by its own definition: the scores of what leaves over all scores."""
    score = normalise_weight(weight).score(norm).double()
    return float(score[~select.mask_groups(score, *pattern)].sum() / score.sum())


def diagonal_of(blocks: Tensor) -> Tensor:
    """The whole matrix of diagonal blocks, in float64."""
    whole: Tensor = torch.block_diag(*blocks.double())  # type: ignore[no-untyped-call]
    return whole


def never_rises(factors: ArmorFactors) -> bool:
    return all(later <= earlier for earlier, later in zip(factors.losses, factors.losses[1:]))


def real_loss(factors: ArmorFactors, weight: Tensor, norm: Tensor) -> float:
    """The relative loss, from the folded product in float64."""
    scaled = normalise_weight(weight)
    product = diagonal_of(factors.left) @ factors.core.double() @ diagonal_of(factors.right)
    error = (product - weight) / scaled.rows[:, None].double() / scaled.columns.double()
    measure = importance(norm).double()
    return float((error.square() * measure).sum() / (scaled.weight.double().square() * measure).sum())


def test_columns_are_normalised_first_then_rows_by_hand() -> None:
    found = normalise_weight(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
    torch.testing.assert_close(found.columns, torch.tensor([5.00001, 2.00001]))
    torch.testing.assert_close(found.rows, torch.tensor([0.6, (0.64 + 1) ** 0.5]), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.weight[1], torch.tensor([0.8, 1.0]) / 1.64**0.5, rtol=1e-4, atol=0)


def test_inputs_without_a_measurement_count_like_the_mean_of_the_others() -> None:
    norm = torch.tensor([1.0, 0.0, 3.0, torch.inf, torch.nan])
    torch.testing.assert_close(importance(norm), torch.tensor([0.2, 1.0, 1.8, 1.0, 1.0]))
    assert importance(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 4), (4, 8)])
@pytest.mark.parametrize("shape", [(64, 64), (32, 96)])
def test_descent_starts_at_nowag_and_never_rises(pattern: tuple[int, int], shape: tuple[int, int]) -> None:
    weight, seen = layer(*shape)
    norm = seen.norm(dim=0)
    found = factorise_weight(weight, norm, pattern, 16, ArmorSearch(rounds=6))
    assert found.initial == found.losses[0] == pytest.approx(nowag_loss(weight, norm, pattern), rel=1e-5)
    assert never_rises(found)
    assert found.losses[-1] < 0.9 * found.initial
    assert real_loss(found, weight, norm) == pytest.approx(found.losses[-1], rel=1e-3)
    kept, of = pattern
    assert (found.mask.view(shape[0], -1, of).sum(-1) == kept).all()
    assert not found.core[~found.mask].any()


def test_the_folded_factors_are_the_product_of_the_whole_matrices() -> None:
    weight, seen = layer(32, 64)
    found = factorise_weight(weight, seen.norm(dim=0), wrapper=(8, 16), search=ArmorSearch(rounds=3))
    assert found.left.shape == (4, 8, 8) and found.right.shape == (4, 16, 16)
    whole = diagonal_of(found.left) @ found.core.double() @ diagonal_of(found.right)
    torch.testing.assert_close(found.dense().double(), whole, rtol=1e-4, atol=1e-5)


def test_wider_wrappers_reach_a_lower_loss() -> None:
    weight, seen = layer()
    search = ArmorSearch(rounds=10, tolerance=0.0)
    losses = [
        factorise_weight(weight, seen.norm(dim=0), wrapper=size, search=search).losses[-1]
        for size in (1, 8, 32)
    ]
    assert losses[0] > losses[1] > losses[2]
    assert losses[0] == pytest.approx(nowag_loss(weight, seen.norm(dim=0), (2, 4)), rel=1e-4)


def test_the_gram_proxy_has_less_output_error_on_correlated_inputs() -> None:
    weight, seen = layer(tokens=512)
    gram = seen.T @ seen
    error = {}
    for proxy in ("diagonal", "gram"):
        found = factorise_weight(weight, gram, wrapper=16, search=ArmorSearch(rounds=8, proxy=proxy))
        assert never_rises(found)
        scaled = normalise_weight(weight)
        # In the scale of the proxy, where every output counts alike.
        error[proxy] = ((seen @ (found.dense() - weight).T) / scaled.rows).square().sum()
    assert error["gram"] < 0.5 * error["diagonal"]


def test_dead_inputs_dead_outputs_and_zero_weights_are_no_trouble() -> None:
    weight, seen = layer()
    weight[:, :4], weight[5], seen[:, 8:16] = 0, 0, 0
    gram = seen.T @ seen
    for proxy in ("diagonal", "gram"):
        found = factorise_weight(weight, gram, wrapper=16, search=ArmorSearch(rounds=4, proxy=proxy))
        assert never_rises(found) and found.dense().isfinite().all()
        assert found.losses[-1] < found.initial
    nothing = factorise_weight(torch.zeros(16, 16), torch.ones(16), wrapper=8, search=ArmorSearch(rounds=2))
    assert not nothing.dense().any() and nothing.losses[-1] == 0


def test_the_same_call_gives_the_same_bytes_and_changes_nothing() -> None:
    weight, seen = layer()
    kept, norm = weight.clone(), seen.norm(dim=0)
    for solver in ("descent", "adam"):
        one, two = (
            factorise_weight(weight, norm, wrapper=16, search=ArmorSearch(5, 3, solver=solver))
            for _ in range(2)
        )
        assert torch.equal(one.dense(), two.dense()) and torch.equal(one.core, two.core)
    assert torch.equal(weight, kept)


def test_adam_descends_too_but_slowly() -> None:
    weight, seen = layer()
    norm = seen.norm(dim=0)
    slow = factorise_weight(weight, norm, wrapper=16, search=ArmorSearch(rounds=100, solver="adam"))
    fast = factorise_weight(weight, norm, wrapper=16, search=ArmorSearch(rounds=10))
    assert fast.losses[-1] < slow.losses[-1] < slow.initial
    assert (slow.mask.view(64, -1, 4).sum(-1) == 2).all() and not slow.core[~slow.mask].any()


@pytest.mark.parametrize(
    ("wrapper", "pattern", "said"),
    [
        (24, (2, 4), "64 outputs do not divide into wrapper blocks of 24"),
        ((16, 24), (2, 4), "64 inputs do not divide into wrapper blocks of 24"),
        ((16, 2), (2, 4), "does not divide into groups of 4"),
        (16, (2, 5), "groups of 5"),
        (16, (8, 16), "12870 supports"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    wrapper: int | tuple[int, int], pattern: tuple[int, int], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        factorise_weight(torch.ones(64, 64), torch.ones(64), pattern, wrapper)


def test_what_the_proxy_needs_must_be_there() -> None:
    with pytest.raises(UsageError, match="needs the Gram matrix"):
        factorise_weight(torch.ones(8, 8), torch.ones(8), wrapper=4, search=ArmorSearch(proxy="gram"))
    with pytest.raises(UsageError, match="only the diagonal"):
        factorise_weight(
            torch.ones(8, 8), torch.eye(8), wrapper=4, search=ArmorSearch(proxy="gram", solver="adam")
        )
    with pytest.raises(QualityError, match="not finite"):
        factorise_weight(torch.full((8, 8), torch.nan), torch.ones(8), wrapper=4)


def test_another_seed_moves_other_groups() -> None:
    weight, seen = layer()
    cores = [
        factorise_weight(
            weight, seen.norm(dim=0), wrapper=16, search=ArmorSearch(20, seed, solver="adam")
        ).core
        for seed in (0, 1)
    ]
    assert not torch.equal(*cores)
