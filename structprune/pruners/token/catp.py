"""CATP: for prompts with several pictures, what their texts, and the last one's question, have to do with.

Source: Li et al. 2026, https://arxiv.org/abs/2508.07871
At the embeddings every picture keeps tokens that stand for all of it and are like the text after it. After K
blocks those of the earlier pictures, the context, are ranked together; one block later the last picture, the
query, keeps what is like the context that is left. Two deviations: a picture never loses all of its tokens,
and both cuts come from one power of what is left at the end, which at the paper's ratio is half of it each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from structprune.decide.token_target import Target
from structprune.errors import UsageError
from structprune.models.streamed import Model
from structprune.plan.plan import Plan
from structprune.pruners.token._scored import ScoredTokens, finite, highest_together, rank
from structprune.pruners.token._staged import StagedTokens, scaled
from structprune.runtime.drop import Drop
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View
from structprune.solvers.facility import facility

LAST, CONTEXT = "attention of the last token", "block of the context"


class CATP(StagedTokens, ScoredTokens):
    """Keep tokens by their picture's text, then those of all earlier pictures by the query.

    A prompt with one picture has no context: its picture is the query, scored by the text after it.

    Args:
        text: Weight of being like the text after the picture, the paper's lambda 1.
        query: Weight of being like the query, beside what the last token's attention gained, its lambda 2.
    """

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.222))
    text: Annotated[float, Field(ge=0)] = 0.7
    query: Annotated[float, Field(ge=0)] = 0.6

    # K is 6; what the query loses goes one block later.
    paper_stages: ClassVar = {0: 0.611, 7: 0.222}

    def stages(self, blocks: int) -> dict[int, float]:
        """Return the embeddings and the block of the query.

        Raises:
            UsageError: Before it there are no two blocks whose attention can be compared.
        """
        if blocks < 4:
            raise UsageError(
                f"{self.method()}: of {blocks} blocks none is left after those that it looks at",
                hint="it takes models with four blocks or more",
            )
        first, last = super().stages(blocks).values()
        return {0: first, max(scaled(7, blocks), 3): last}

    def watched(self, blocks: int) -> Iterable[int]:
        """Return the block before that of the context."""
        return (max(self.stages(blocks)) - 2,)

    def drops(self, plan: Plan, model: Model) -> list[Drop]:
        """Return what the engine carries out; the context goes a block ahead of the plan's last stage."""
        found = super().drops(plan, model)
        cuts = (replace(one, block=one.block - ahead, pooled=True) for one in found[-1:] for ahead in (1, 0))
        return [*found[:-1], *cuts]

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return what the cosines of all pairs cost, a row of attention and the mean of a prompt."""
        return size**2 * cost.hidden + counts[0][1] * (cost.queries + cost.hidden)

    def watch(self, seen: View) -> None:
        """Note the attention that the last token pays, at the tokens' places in the forward."""
        seen.notes[LAST], seen.notes[CONTEXT] = seen.marked(seen.paid_by_last()), seen.block + 1

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return which tokens of each image stay; in a row the context shares what it keeps."""
        if seen.block == 0:
            return self._standing_for_all(seen, keep)
        context, scores = ~seen.latest, self.scored(seen)
        ranks = rank(scores, seen.real)
        if seen.block > seen.notes[CONTEXT]:
            return ((ranks < keep[:, None]) | context[:, None]) & seen.real
        # The best of each picture is out of the competition.
        scores, row = scores.masked_fill(ranks == 0, torch.inf), seen.images.row[seen.number]
        return highest_together(scores, seen.real & context[:, None], keep, row) | (
            seen.real & ~context[:, None]
        )

    def score(self, seen: View) -> Tensor:
        """Return how much the query wants of the context, or is like it, float32, shape [images, tokens]."""
        images, row = seen.images, seen.images.row[seen.number]
        if seen.block > seen.notes[CONTEXT]:
            shown = images.visual[row] & (images.number[row] != seen.number[:, None])
            # Without a context there is the question; without one, the last token.
            for other in (images.after[seen.number], images.last[row]):
                shown = torch.where(shown.any(1, keepdim=True), shown, other)
            return cosine_similarity(seen.features(), seen.mean(shown)[:, None], dim=2)
        gained = seen.paid_by_last() - seen.spread(seen.notes[LAST], whole=True)
        last = images.number.amax(1)[row]
        sample = images.after[last] | (images.number[row] == last[:, None])
        like = cosine_similarity(seen.features(), seen.mean(sample)[:, None], dim=2)
        return gained.clamp(min=0) + self.query * like

    def _standing_for_all(self, seen: View, keep: Tensor) -> Tensor:
        features = finite(seen.features(), seen.real, self.method())
        words, real = seen.text(until_next=True)
        like = cosine_similarity(features, (words * real[..., None]).sum(1, keepdim=True), dim=2)
        unit, chosen = normalize(features, dim=2), torch.zeros_like(seen.real)
        # From 0 to 1, as a right angle is a half.
        alike, bonus = (1 + unit @ unit.transpose(1, 2)) / 2, self.text * (1 + like) / 2
        for image, (left, count) in enumerate(zip(seen.left.tolist(), keep.tolist(), strict=True)):
            chosen[image, facility(alike[image, :left, :left], bonus[image, :left], count)] = True
        return chosen
