"""The layer-wise Hessian of a linear: damped, and factored for the solvers that update what they keep.

The squared error of a linear's output, summed over tokens, is tr(dW H dW^T) with H = X^T X. Every solver
works on H with a little of its mean diagonal added, and measures its error in that same metric.

Source: Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774

We deviate from the released code in three ways. Eliminating H from its last input backwards gives at once the
factor that the code reaches by a Cholesky, an inverse and another Cholesky. The mean leaves dead inputs out,
and a dead input gets the mean and not 1, so that the scale of H does not matter. A factorisation that fails
raises the damping in counted steps.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from structprune.errors import QualityError

# SparseGPT's.
DAMPING = 0.01
Damping = Annotated[float, Field(gt=0, le=1)]
"""A field's type: what is added to the diagonal of a Gram matrix, in units of its mean."""

# Where a damping of zero continues when it fails: far below any usual one, far above float32's rounding.
SMALLEST_RAISE = 1e-4
# At one mean diagonal the update is hardly more than noise; a matrix that needs more is not a Gram matrix.
LARGEST_DAMPING = 1.0
# Inputs eliminated by one call of the library; wider pieces are split in two and become products of matrices,
# which a processor multiplies several times faster than it eliminates.
LEAF = 128


@dataclass(frozen=True)
class DampedHessian:
    """A Hessian that can be inverted.

    Args:
        hessian: H with its damping, shape [in, in], in the units of the Gram matrix.
        dead: Which inputs were zero on every token, shape [in], bool.
        mean: The mean of the diagonal over the inputs that are not dead; 1 when all are.
    """

    hessian: Tensor
    dead: Tensor
    mean: float


@dataclass(frozen=True)
class InverseFactor:
    """The factor of an inverse Hessian: H^-1 = U^T U.

    Args:
        upper: U, upper triangular, shape [in, in]; float32, or float64 if the Gram matrix is. The solvers
            work in its precision.
        dead: Which inputs were zero on every token, shape [in], bool.
        damping: The damping that was used, in mean diagonals.
        raises: How often the damping had to be raised.
        precision: In what the factorisation succeeded.
    """

    upper: Tensor
    dead: Tensor
    damping: float
    raises: int
    precision: str

    @property
    def facts(self) -> dict[str, Any]:
        """Return what a report should tell: damping, its raises, precision, and the count of dead inputs."""
        return {
            "damping": self.damping,
            "damping_raises": self.raises,
            "precision": self.precision,
            "dead_inputs": int(self.dead.sum()),
        }


def is_finite(values: Tensor) -> bool:
    """Tell whether no value is NaN or infinite."""
    # A finite sum says so in one pass without temporaries; any other may have overflowed and is no answer.
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def read_weight(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a weight in some precision, apart from its gradient; not a copy when it has that already.

    Raises:
        QualityError: It holds NaN or infinity.
    """
    dense = weight.detach().to(dtype)
    if not is_finite(dense):
        raise QualityError(
            f"a weight of {list(weight.shape)} is NaN or infinite",
            hint="the checkpoint is damaged; what is missing cannot be made up for",
        )
    return dense


def damp_hessian(gram: Tensor, damping: float = DAMPING, dtype: torch.dtype = torch.float32) -> DampedHessian:
    """Add `damping` mean diagonals to the diagonal; a dead input gets one mean diagonal and no neighbours.

    Args:
        gram: X^T X over all tokens, shape [in, in]; its scale does not matter.
        damping: At least 0, in units of the mean diagonal.
        dtype: Of the result.

    Raises:
        QualityError: The matrix holds NaN or infinity, or a negative diagonal.
    """
    if damping < 0:
        raise ValueError(f"a damping of {damping} is negative")
    hessian = gram.detach().to(dtype, copy=True)
    diagonal = hessian.diagonal()
    if not is_finite(hessian) or bool((diagonal < 0).any()):
        raise QualityError(
            f"the Gram matrix {list(gram.shape)} holds NaN, infinity or a negative diagonal",
            hint="the activations overflowed: calibrate in float32 or bfloat16, or exclude this matrix",
        )
    dead = diagonal == 0
    mean = float(diagonal.sum(dtype=torch.float64)) / max(1, int((~dead).sum())) or 1.0
    if bool(dead.any()):
        # Products of tiny activations may be left beside a square that underflowed.
        hessian[dead] = 0
        hessian[:, dead] = 0
        diagonal[dead] = mean
    diagonal += damping * mean
    return DampedHessian(hessian, dead, mean)


def factor_inverse(gram: Tensor, damping: float = DAMPING) -> InverseFactor:
    """Factor the inverse of the damped Hessian, with more precision and then more damping where it must be.

    Args:
        gram: X^T X over all tokens, shape [in, in]; its scale does not matter.
        damping: At least 0, in units of the mean diagonal.

    Raises:
        QualityError: The matrix holds NaN or infinity, or no damping up to one mean diagonal helps.
    """
    base = damp_hessian(gram, damping=0.0, dtype=torch.promote_types(gram.dtype, torch.float32))
    level, raises = damping, 0
    if level < 0:
        raise ValueError(f"a damping of {level} is negative")
    while True:
        for precision in dict.fromkeys((base.hessian.dtype, torch.float64)):
            upper = _inverse_factor(base, level, precision)
            if upper is not None:
                return InverseFactor(upper, base.dead, level, raises, str(precision).removeprefix("torch."))
        if level >= LARGEST_DAMPING:
            raise QualityError(
                f"the Gram matrix {list(gram.shape)} has no Cholesky factor at a damping of {level:g}",
                hint="use more calibration tokens or a larger damping, or exclude this matrix",
            )
        level, raises = min(max(10 * level, SMALLEST_RAISE), LARGEST_DAMPING), raises + 1


def _inverse_factor(base: DampedHessian, damping: float, precision: torch.dtype) -> Tensor | None:
    """Return U of the Hessian with its damping; None when it is not positive definite in this precision."""
    # The mean becomes 1, so that neither huge nor tiny activations leave the range of float32.
    hessian = base.hessian.to(precision, copy=True).div_(base.mean)
    hessian.diagonal().add_(damping)
    upper = torch.zeros_like(hessian)
    # Every pivot is at least the damping; one that rounding could have made up says nothing.
    if not _eliminate(hessian, upper, noise=torch.finfo(precision).eps * len(hessian)):
        return None
    upper = upper.div_(base.mean**0.5).to(base.hessian.dtype)
    return upper if is_finite(upper) else None


def _eliminate(hessian: Tensor, upper: Tensor, noise: float) -> bool:
    """Fill `upper` with U, where H^-1 = U^T U; tell whether all pivots were above the noise.

    With R = U^-1, which is upper triangular, H = R R^T. Of H = [[A, B], [B^T, C]] the part C gives its own
    R_c, then R_b = B R_c^-T, and what is left of A is A - R_b R_b^T.

    Args:
        hessian: Shape [in, in]; overwritten.
        upper: Zeros, shape [in, in].
        noise: The largest pivot that is not believed.
    """
    size = len(hessian)
    if size <= LEAF:
        # In reversed order R is a lower triangle.
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if int(failed) or bool((lower.diagonal().square() <= noise).any()):
            return False
        identity = torch.eye(size, dtype=hessian.dtype, device=hessian.device)
        upper.copy_(torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1))
        return True
    half = size // 2
    first, last = upper[:half, :half], upper[half:, half:]
    if not _eliminate(hessian[half:, half:], last, noise):
        return False
    between = hessian[:half, half:] @ last.T
    hessian[:half, :half].addmm_(between, between.T, alpha=-1)
    if not _eliminate(hessian[:half, :half], first, noise):
        return False
    upper[:half, half:] = (first @ (between @ last)).neg_()
    return True
