"""How fast SparseGPT's solver is, beside the paper's description written down plainly, on one thread.

The baseline takes every linear alone: its own Gram matrix, a Cholesky, an inverse and a Cholesky, then column
by column in blocks of 128. Ours takes the linears that read the same input as one stack. Both remove the same
exact counts, take turns, and must agree: on the mask but for one weight in a thousand, where rounding
decides, and, given the same mask, on the weights within 1e-4 of the largest.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from structprune.calibration.statistics import InputSums
from structprune.solvers.hessian import DAMPING, factor_inverse
from structprune.solvers.sparsegpt import BLOCK, solve_sparsegpt

TOKENS = 8192
Solved = tuple[list[Tensor], list[Tensor]]
Sparsity = float | tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One group of linears, timed both ways; seconds are medians. The Gram matrices are timed apart."""

    name: str
    sparsity: str
    ours: float
    baseline: float
    ours_gram: float
    baseline_gram: float

    @property
    def ratio(self) -> float:
        """Return how many times faster the solver is than the baseline's."""
        return self.baseline / self.ours

    @property
    def whole_ratio(self) -> float:
        """Return how many times faster it is with the Gram matrices counted in."""
        return (self.baseline + self.baseline_gram) / (self.ours + self.ours_gram)


def plain_gram(inputs: Tensor) -> Tensor:
    """Return X^T X."""
    return inputs.T @ inputs


def our_gram(inputs: Tensor) -> Tensor:
    """Return X^T X as calibration adds it up, beside the moments."""
    statistic = InputSums(frozenset({"gram"}), inputs.shape[1], inputs.device)
    statistic.add(inputs)
    return statistic.gram


def plain_factor(gram: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse, by way of the inverse."""
    hessian = gram.clone()
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def plain(
    weight: Tensor, gram: Tensor, sparsity: Sparsity, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Solve one linear as the paper describes it, or for a given mask; return the mask and the new weight."""
    upper = plain_factor(gram)
    new = weight.clone()
    out, inputs = new.shape
    kept = torch.ones_like(new, dtype=torch.bool) if given is None else given
    for first in range(0, inputs, BLOCK):
        last = min(first + BLOCK, inputs)
        part, errors = new[:, first:last].clone(), new.new_zeros(out, last - first)
        local = upper[first:last, first:last]
        if given is None and not isinstance(sparsity, tuple):
            scores = (part**2 / local.diagonal() ** 2).flatten()
            count = int(sparsity * out * last) - int(sparsity * out * first)
            mask = torch.ones_like(scores, dtype=torch.bool)
            mask[torch.topk(scores, count, largest=False, sorted=False).indices] = False
            kept[:, first:last] = mask.view(out, -1)
        for column in range(last - first):
            if given is None and isinstance(sparsity, tuple) and column % sparsity[1] == 0:
                group = slice(column, column + sparsity[1])
                scores = part[:, group] ** 2 / local.diagonal()[group] ** 2
                lowest = torch.topk(scores, sparsity[1] - sparsity[0], dim=1, largest=False).indices
                kept[:, first:last].scatter_(1, column + lowest, False)
            weights = part[:, column].clone()
            stays = torch.where(kept[:, first + column], weights, 0.0)
            error = (weights - stays) / local[column, column]
            part[:, column:] -= error[:, None] @ local[column, column:][None]
            part[:, column] = stays
            errors[:, column] = error
        new[:, first:last] = part
        new[:, last:] -= errors @ upper[first:last, last:]
    return kept, new


def timed(work: Callable[[], object], taken: list[float]) -> None:
    start = time.perf_counter()
    work()
    taken.append(time.perf_counter() - start)


def compare(name: str, outs: list[int], width: int, sparsity: Sparsity, repeats: int) -> Case:
    """Time both on the same weights and inputs, taking turns, after one untimed round that compares them."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + 0.5 * torch.eye(width)
    inputs = torch.randn(TOKENS, width, generator=generator) @ mix
    weights = [torch.randn(out, width, generator=generator) * 0.02 for out in outs]
    gram = our_gram(inputs)

    def ours() -> Solved:
        solved = solve_sparsegpt(weights, factor_inverse(gram), [sparsity] * len(weights))
        return [mask for mask, _, _ in solved], [new for _, new, _ in solved]

    def baseline() -> Solved:
        solved = [plain(weight, gram, sparsity) for weight in weights]
        return [mask for mask, _ in solved], [new for _, new in solved]

    for weight, mask, new, other in zip(weights, *ours(), baseline()[0]):
        differing = float((mask != other).float().mean())
        assert differing < 1e-3, f"{name}: {differing:.1e} of the masks differ"
        _, wanted = plain(weight, gram, sparsity, mask)
        furthest = float((new - wanted).abs().max() / wanted.abs().max())
        assert furthest < 1e-4, f"{name}: weights differ by {furthest:.1e}"
    taken: dict[str, list[float]] = {"ours": [], "baseline": [], "ours_gram": [], "baseline_gram": []}
    for _ in range(repeats):
        timed(ours, taken["ours"])
        timed(baseline, taken["baseline"])
        timed(lambda: our_gram(inputs), taken["ours_gram"])
        timed(lambda: [plain_gram(inputs) for _ in weights], taken["baseline_gram"])
    medians = {key: statistics.median(seconds) for key, seconds in taken.items()}
    shown = f"{sparsity[0]}:{sparsity[1]}" if isinstance(sparsity, tuple) else str(sparsity)
    return Case(name, shown, **medians)


def main() -> None:
    """Time every case and print one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    groups = {
        "q k v, 3 x 768 x 768": ([768] * 3, 768),
        "o, 768 x 768": ([768], 768),
        "gate up, 2 x 2048 x 768": ([2048] * 2, 768),
        "down, 768 x 2048": ([768], 2048),
    }
    cases = [
        compare(name, outs, width, sparsity, options.repeats)
        for sparsity in (0.5, (2, 4))
        for name, (outs, width) in groups.items()
    ]
    if options.json:
        figures = [asdict(case) | {"ratio": case.ratio, "whole_ratio": case.whole_ratio} for case in cases]
        print(json.dumps(figures))
        return
    print(f"{'linears':24} {'removed':>7} {'ours':>10} {'baseline':>11} {'ratio':>7} {'with Gram':>10}")
    for case in cases:
        print(
            f"{case.name:24} {case.sparsity:>7} {case.ours * 1e3:7.1f} ms {case.baseline * 1e3:8.1f} ms"
            f" {case.ratio:6.1f}x {case.whole_ratio:9.1f}x"
        )
    ours, baseline = (sum(getattr(case, key) for case in cases) for key in ("ours", "baseline"))
    print(f"{'all':24} {'':>7} {ours * 1e3:7.1f} ms {baseline * 1e3:8.1f} ms {baseline / ours:6.1f}x")


if __name__ == "__main__":
    main()
