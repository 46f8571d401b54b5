"""Recoverable compression: tokens stay that stand out to the tower, and of the others to the question.

Source: Chen et al. 2025, https://arxiv.org/abs/2409.01179
What is left over is clustered, and each cluster stays as the mean of its tokens, in the place of the one
that is looked at most; the paper puts them last (`compat`). The paper scores by products with the class token
and with the text tower's question: here by what the class token pays, and by the language model's embeddings
of the question, for no checkpoint brings that tower. Filters are those of box plots.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize, one_hot
from transformers import PreTrainedModel

from structprune.decide.token_target import Target
from structprune.pruners.token._looking import LookingTokens
from structprune.pruners.token._merged import reordered
from structprune.pruners.token._outliers import outliers
from structprune.pruners.token._scored import finite, highest
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View
from structprune.solvers.density_peaks import density_peaks

WEIGHTS = "weights"
QUESTION = "embeddings of the language model, cosine with the mean of the words after the image"


class Recoverable(LookingTokens):
    """Keep what stands out to the class token, recover what stands out to the text, cluster the rest.

    Args:
        target: The most that is left; an image may have less.
        iqr: A token stands out so many interquartile ranges above the upper quartile.
        text_iqr: The same for the text, of the tokens that do not stand out already; None recovers none.
        clusters: How many clusters there are, as a share of the tokens that are left over.
        floor: Share of the target that is left at least, by more clusters where too few tokens stand out.
        compat: Put clusters last.
    """

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.1))
    iqr: Annotated[float, Field(ge=0)] = 1.5
    text_iqr: Annotated[float, Field(ge=0)] | None = 1.5
    clusters: Annotated[float, Field(ge=0, le=1)] = 0.1
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    compat: bool = False

    tower_layers: ClassVar = (-1,)
    paper_positions: ClassVar = "compact"

    @property
    def at_most(self) -> bool:
        """Tell that an image may have fewer tokens left than the target."""
        return True

    def facts(self, model: PreTrainedModel) -> dict[str, str]:
        """Return what is looked at for attention, and for the question."""
        return super().facts(model) | {"question": QUESTION}

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return what the distances of all pairs cost, and the cosines with the question."""
        return size * (size + 1) * cost.hidden

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return what stands out, and the strongest of every cluster, bool, shape [images, tokens].

        Raises:
            QualityError: A feature or an attention is not finite.
        """
        paid = self.attention(seen, -1)
        features = finite(seen.features(), seen.real, self.method())
        patch = seen.patches
        kept = highest(paid, patch, outliers(paid, patch, self.iqr).sum(1).minimum(keep))
        if self.text_iqr is not None:
            asked, rest = self._asked(seen, features), patch & ~kept
            count = outliers(asked, rest, self.text_iqr).sum(1).minimum(keep - kept.sum(1))
            kept = kept | highest(asked, rest, count)
        over, room = patch & ~kept, keep - kept.sum(1)
        share = torch.floor(self.clusters * over.sum(1) + 0.5).long()
        least = torch.ceil(self.floor * keep).long().clamp(min=1) - kept.sum(1)
        wanted = share.maximum(least).minimum(over.sum(1)).minimum(room).clamp(min=0)
        weights = torch.diag_embed(kept.float())
        for image, count in enumerate(wanted.tolist()):
            if not count:
                continue
            place = over[image].nonzero().flatten()
            member = one_hot(density_peaks(features[image, place], count), count).T
            first = paid[image, place].expand_as(member).masked_fill(member == 0, -torch.inf).argmax(1)
            weights[image, place[first][:, None], place] = member / member.sum(1, keepdim=True)
        chosen = weights.any(2)
        last = (chosen & ~kept).int() + 2 * (~chosen).int()
        order = torch.argsort(last, dim=1, stable=True)
        seen.notes[WEIGHTS] = reordered(chosen, order, weights) if self.compat else weights
        return chosen

    def merge(self, seen: View, chosen: Tensor) -> Tensor | None:
        """Return the mean of every cluster; what stands out stays as it is."""
        weights: Tensor | None = seen.notes.pop(WEIGHTS, None)
        return weights

    def _asked(self, seen: View, features: Tensor) -> Tensor:
        """Return the cosines of tokens with the question, [images, tokens]; 0 where there is none."""
        words, real = seen.text()
        mean = (words * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        return (normalize(features, dim=-1) @ normalize(mean, dim=-1)[..., None])[..., 0]
