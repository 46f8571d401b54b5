"""PruMerge: visual tokens stay that the class token looks at unusually much, and take in what is like them.

Source: Shang et al. 2024, https://arxiv.org/abs/2403.15388
Attention is the mean over heads, as the paper reads. The released code adds neighbours without dividing by
their weights (`compat`); it also takes queries and keys of all heads as one, and makes one token more of all
that is left over, which is not offered here.
"""

from torch import Tensor

from structprune.pruners.token._outliers import OutlierTokens
from structprune.runtime.view import View


class PruMerge(OutlierTokens):
    """Keep the tokens whose attention stands out, as many as the image has, and merge others into them."""

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return the tokens that stand out, at most `keep`, bool, shape [images, tokens].

        Raises:
            QualityError: An attention is not a number.
        """
        return self.standing_out(seen, keep)
