"""SparseVLM: visual tokens stay that those words look at which the image has to do with.

Source: Zhang et al. 2025, https://arxiv.org/abs/2410.04417
Version 1 makes a few tokens of the best that go, and counts positions anew; version 2 does neither. What it
makes stands where the strongest of them stood, and is counted with those that stay. Stages and shares are the
released table for 192 tokens, not the ranks of the paper; attention of all heads counts, undivided.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from structprune.decide.token_target import Target
from structprune.pruners.token._scored import ScoredTokens, rank
from structprune.pruners.token._staged import StagedTokens
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View
from structprune.solvers.density_peaks import density_peaks

# Of the tokens that go, the share that is used again, and how many of these make one cluster.
RECYCLED, TOGETHER = 0.3, 10
RATERS, WEIGHTS = "raters", "weights"


class SparseVLM(StagedTokens, ScoredTokens):
    """Score a token by the attention that the raters pay, words chosen once, at the embeddings.

    Args:
        version: Whether what goes is used again (v1) or not (v2).
    """

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.191))
    version: Literal["v1", "v2"] = "v2"

    paper_stages: ClassVar = {3: 300 / 576, 7: 200 / 576, 16: 110 / 576}

    @property
    def usual_positions(self) -> Literal["keep", "compact"]:
        """Return what becomes of positions unless `positions` says it."""
        return "compact" if self.version == "v1" else "keep"

    def watched(self, blocks: int) -> Iterable[int]:
        """Return the first block, where words are compared with the image."""
        return (0,)

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return what a word costs: its products with all tokens, and a row of attention in every stage."""
        looked = size * cost.hidden + self.looked_at(size, counts) * cost.queries
        if self.version == "v2":
            return looked
        entering = [size, *(left for _, left in counts)]
        pools = [_pool(before - after) for before, after in pairwise(entering) if after < before]
        return looked + sum(pool**2 for pool in pools) * cost.hidden

    def watch(self, seen: View) -> None:
        """Note which words rate: those that are more than the mean of what tokens are most like."""
        words, real = seen.text()
        alike = seen.features() @ words.transpose(1, 2)
        shares = alike.masked_fill(~real[:, None], -torch.inf).softmax(2)
        mine = (shares * seen.real[..., None]).sum(1) / seen.left[:, None]
        rating = real & (mine > 1 / real.sum(1, keepdim=True))
        # Words that are all alike rate together.
        rating = torch.where(rating.any(1, keepdim=True), rating, real)
        raters = seen.images.after.clone()
        places = raters[seen.number]
        places[places.clone()] = rating[real]
        raters[seen.number] = places
        seen.notes[RATERS] = raters

    def score(self, seen: View) -> Tensor:
        """Return the mean over heads and raters, float32, shape [images, tokens]."""
        return seen.paid_by_text(seen.notes[RATERS])

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return the tokens of the highest scores, and the strongest of every cluster, [images, tokens]."""
        ranks = rank(self.scored(seen), seen.real)
        if self.version == "v2":
            return (ranks < keep[:, None]) & seen.real
        features, width = seen.features(), seen.real.shape[1]
        weights = torch.zeros(len(ranks), width, width, device=ranks.device)
        for image, (left, count) in enumerate(zip(seen.left.tolist(), keep.tolist(), strict=True)):
            weights[image, :left, :left] = _recycled(features[image, :left], ranks[image, :left], count)
        seen.notes[WEIGHTS] = weights
        return weights.any(2)

    def merge(self, seen: View, chosen: Tensor) -> Tensor | None:
        """Return the mean of every cluster in its strongest token; others stay as they are."""
        weights: Tensor | None = seen.notes.pop(WEIGHTS, None)
        return weights


def _pool(gone: int) -> int:
    """Return how many of the tokens that go are used again."""
    return int(RECYCLED * gone) + 1


def _recycled(features: Tensor, ranks: Tensor, keep: int) -> Tensor:
    """Return how much of every token goes into each one that stays, zero rows for others, [tokens, tokens].

    Args:
        features: Of one image, shape [tokens, features].
        ranks: How many tokens score higher than each, shape [tokens].
        keep: How many stay, clusters counted.
    """
    pool = _pool(len(ranks) - keep) if keep < len(ranks) else 0
    # The clusters take the place of the last that would stay; one token at least is itself.
    clusters = min(pool // TOGETHER + 1, keep - 1) if pool else 0
    weights = torch.diag((ranks < keep - clusters).float())
    if not clusters:
        return weights
    order = ranks.argsort()[keep - clusters :][:pool]
    member = torch.nn.functional.one_hot(density_peaks(features[order], clusters)).T
    # Ordered by rank: the first of a cluster is its strongest.
    strongest = order[member.argmax(1)]
    weights[strongest[:, None], order] = member / member.sum(1, keepdim=True)
    return weights
