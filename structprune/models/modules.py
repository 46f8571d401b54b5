"""The modules of our own that a pruned model may contain.

Only torch is imported, because this file also travels with a model that plain transformers is to run.

Source: Liu et al. 2025, ARMOR, https://arxiv.org/abs/2510.05528
"""

import torch
from torch import Tensor, nn


def blockwise(blocks: Tensor, values: Tensor) -> Tensor:
    """Multiply vectors by a block-diagonal matrix.

    Args:
        blocks: The diagonal's blocks, shape [n, b, b].
        values: Vectors along the last dimension, shape [..., n * b].

    Returns:
        Shape [..., n * b].
    """
    count, size, _ = blocks.shape
    rows = values.reshape(-1, count, size).transpose(0, 1)
    return torch.bmm(rows, blocks.mT).transpose(0, 1).reshape(values.shape)


def folded(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """Return the matrix that a factored linear multiplies by, shape [out, in].

    Args:
        left: Diagonal blocks, shape [out / b, b, b].
        core: Shape [out, in].
        right: Diagonal blocks, shape [in / c, c, c].
    """
    count, size, _ = left.shape
    rows = blockwise(right.mT, core).reshape(count, size, -1)
    return torch.bmm(left, rows).reshape(core.shape)


class FactoredLinear(nn.Module):
    """A linear stored as a sparse core between two block-diagonal wrappers: y = left(core(right x)) + bias.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        wrapper_in: Size of a block of the right wrapper; it divides the inputs.
        wrapper_out: Size of a block of the left wrapper; it divides the outputs.
        bias: Whether a bias is added, after the left wrapper.

    Raises:
        ValueError: A wrapper does not divide its side.
    """

    left: nn.Parameter
    right: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        wrapper_in: int,
        wrapper_out: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size, wrapper in (
            ("inputs", in_features, wrapper_in),
            ("outputs", out_features, wrapper_out),
        ):
            if wrapper < 1 or size % wrapper:
                raise ValueError(f"{size} {name} do not divide into blocks of {wrapper}")
        self.in_features, self.out_features = in_features, out_features
        self.core = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)
        # Identities, so that a module that was never filled is its core.
        eye_out = torch.eye(wrapper_out, device=device, dtype=dtype)
        eye_in = torch.eye(wrapper_in, device=device, dtype=dtype)
        self.left = nn.Parameter(eye_out.repeat(out_features // wrapper_out, 1, 1))
        self.right = nn.Parameter(eye_in.repeat(in_features // wrapper_in, 1, 1))
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))

    @classmethod
    def like(cls, linear: nn.Linear, wrapper_in: int, wrapper_out: int) -> "FactoredLinear":
        """Return one that takes a linear's place: its sizes, device and dtype, a bias where it has one."""
        return cls(
            linear.in_features,
            linear.out_features,
            wrapper_in,
            wrapper_out,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        outputs = blockwise(self.left, self.core(blockwise(self.right, inputs)))
        return outputs if self.bias is None else outputs + self.bias

    def dense(self) -> Tensor:
        """Return the folded product, shape [out, in]."""
        return folded(self.left, self.core.weight, self.right)

    def extra_repr(self) -> str:
        """Name the sizes that the children do not show."""
        wrappers = f"wrapper_in={self.right.shape[1]}, wrapper_out={self.left.shape[1]}"
        return f"{wrappers}, bias={self.bias is not None}"
