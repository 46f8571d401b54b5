"""CDPruner: visual tokens stay that the question has to do with and that are unlike one another.

Source: Zhang et al. 2025, https://arxiv.org/abs/2506.10967
Relevance is meant as the paper reads: a token that is more like the question counts more; the released code
negates it (`compat`). No checkpoint brings the text tower that the paper asks, so the question is what the
language model's embeddings say of it. The released code scales relevance over the whole batch; here every
image has its own scale.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from structprune.decide.token_target import Target
from structprune.pruners.token._family import TokenPruner
from structprune.pruners.token._scored import finite
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View
from structprune.solvers.determinantal import determinantal

QUESTION = "embeddings of the language model, mean of cosines over the words after the image"
# The least relevant token is not quite irrelevant; and cosines that differ by less differ by rounding.
LEAST = 1e-6


class CdPruner(TokenPruner):
    """Maximise the determinant of relevance times likeness times relevance, greedily.

    Args:
        theta: Weight of relevance against diversity, from 0 (diversity alone) below 1; None takes relevance
            as it is.
        compat: Negate relevance, as the released code does.
    """

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.111))
    theta: Annotated[float, Field(ge=0, lt=1)] | None = None
    compat: bool = False

    paper_positions: ClassVar = "compact"

    def facts(self, model: PreTrainedModel) -> dict[str, str]:
        """Return what is asked for the question."""
        return {"question": QUESTION}

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return what the cosines of all pairs cost, and with one word, and the columns of the factor."""
        left = counts[-1][1]
        return size * (size + 1) * cost.hidden + size * left * (left - 1) // 2

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return tokens that matter and are far apart, bool, shape [images, tokens].

        Raises:
            QualityError: A feature is not finite.
        """
        unit = normalize(finite(seen.features(), seen.real, self.method()), dim=-1)
        weight = self.relevance(seen, unit)
        kernel = weight[:, :, None] * (unit @ unit.transpose(1, 2)) * weight[:, None]
        return determinantal(kernel, seen.real, keep)

    def relevance(self, seen: View, unit: Tensor) -> Tensor:
        """Return how much tokens have to do with the text after the image, float32 [images, tokens].

        Args:
            seen: Where there are the texts.
            unit: Directions of the tokens, float32 [images, tokens, hidden].

        Returns:
            Above 0 to 1, or with theta the weights that it makes of that; 1 for all where nothing is asked.
        """
        words, real = seen.text()
        alike = unit @ normalize(words, dim=-1).transpose(1, 2)
        mean = (alike * real[:, None]).sum(2) / real.sum(1, keepdim=True).clamp(min=1)
        mean = -mean if self.compat else mean
        low = mean.masked_fill(~seen.real, torch.inf).amin(1, keepdim=True)
        span = mean.masked_fill(~seen.real, -torch.inf).amax(1, keepdim=True) - low
        found = torch.where(span > LEAST, (mean - low + LEAST) / span, 1.0)
        if self.theta is not None:
            found = torch.exp(self.theta / (2 * (1 - self.theta)) * found)
        return found
