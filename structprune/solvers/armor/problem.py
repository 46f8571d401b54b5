"""The least-squares problem behind ARMOR: what is approximated, in which measure, and where a search stands.

Source: Liu et al. 2025, ARMOR, https://arxiv.org/abs/2510.05528
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from structprune.models.modules import folded

ALL = slice(None)


@dataclass(frozen=True)
class State:
    """Where the search stands, in the normalised and weighted scale.

    Attributes:
        left: Shape [out / b, b, b].
        core: Shape [out, in].
        right: Shape [in / c, c, c].
        residual: left @ core @ right - target, shape [out, in].
        loss: Relative to the loss of the zero matrix.
    """

    left: Tensor
    core: Tensor
    right: Tensor
    residual: Tensor
    loss: float


@dataclass(frozen=True)
class Problem:
    """What is to be approximated, and in which measure.

    The columns carry sqrt(D), so that the diagonal proxy is the plain sum of squares.

    Attributes:
        target: The normalised weight times sqrt(D), shape [out, in].
        gram: H between the columns, with ones on its diagonal, shape [in, in]; None is the identity.
        pattern: (N, M).
        sizes: Blocks of the left and of the right wrapper.
    """

    target: Tensor
    gram: Tensor | None
    pattern: tuple[int, int]
    sizes: tuple[int, int]

    @cached_property
    def total(self) -> float:
        """Return the loss of the zero matrix, or 1 if the target is zero itself."""
        return self._squares(self.target) or 1.0

    @property
    def parts(self) -> list[slice]:
        """Return the block columns that can be updated together: all, or with a Gram matrix one by one."""
        count = self.target.shape[1] // self.sizes[1]
        # The identity does not couple block columns; a Gram matrix does, and they must take turns.
        return [slice(0, count)] if self.gram is None else [slice(k, k + 1) for k in range(count)]

    def weighed(self, residual: Tensor, span: slice = ALL) -> Tensor:
        """Return some inputs of the residual times H: half the gradient of the loss, shape [out, span]."""
        return residual[:, span] if self.gram is None else residual @ self.gram[:, span]

    def loss(self, residual: Tensor) -> float:
        """Return the relative loss of a residual, summed in float64."""
        return self._squares(residual) / self.total

    def _squares(self, matrix: Tensor) -> float:
        if self.gram is None:
            return float(matrix.double().square().sum())
        return float((matrix.double() * self.weighed(matrix).double()).sum())

    def state(self, left: Tensor, core: Tensor, right: Tensor) -> State:
        """Return the state of three factors, its residual computed anew."""
        residual = folded(left, core, right) - self.target
        return State(left, core, right, residual, self.loss(residual))

    def columns(self, matrix: Tensor) -> Tensor:
        """View [out, in] by block columns, shape [in / c, out, c]."""
        return matrix.view(matrix.shape[0], -1, self.sizes[1]).transpose(0, 1)

    def rows(self, matrix: Tensor) -> Tensor:
        """View [out, in] by block rows, shape [out / b, b, in]."""
        return matrix.view(-1, self.sizes[0], matrix.shape[1])

    def pairs(self, matrix: Tensor) -> Tensor:
        """Return [out, in] by blocks, shape [out / b, in / c, b, c]."""
        size_out, size_in = self.sizes
        count = matrix.shape[1] // size_in
        return matrix.reshape(-1, size_out, count, size_in).transpose(1, 2)

    def between(self, part: slice) -> Tensor | None:
        """Return H inside the block columns of a part, shape [columns, c, c]; None is the identity."""
        if self.gram is None:
            return None
        inside = self.span(part)
        return self.gram[inside, inside][None]

    def span(self, part: slice) -> slice:
        """Return the inputs that belong to block columns."""
        return slice(part.start * self.sizes[1], part.stop * self.sizes[1])
