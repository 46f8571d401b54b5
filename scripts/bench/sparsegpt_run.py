"""How long a whole SparseGPT calibration takes, beside the paper's description written down plainly.

The model is the random Llama of 100 M parameters, in memory; 16 windows of 512 tokens; one thread. The
baseline hooks all 7 linears of a block, adds up a Gram matrix for each, solves each alone column by column
and runs the block again, pruned, for the next one's inputs. Ours is `calibrate`. They take turns. The tokens
are drawn from the whole vocabulary, as texts have thousands of different ones: a random text of 27 letters
gives the first Gram matrix rank 28, and then float32 settles less about the masks, whoever computes them.

Statistics are the time inside the hooks (baseline) or inside the running statistic (ours), the forward apart.
Agreement is looked at apart and untimed, block by block on the very same inputs: those that blocks pruned by
our plan hand on. Runs of their own would differ more with every block, because rounding is handed on too.
Both are also asked in float64: there rounding decides nothing, and the masks must be the same.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from model import VOCABULARY, random_llama
from sparsegpt import Sparsity, plain
from torch import Tensor, nn
from transformers import PreTrainedModel

from structprune.calibration import collect
from structprune.calibration.statistics import InputSums, Parts, Statistics
from structprune.models.streamed import Batch, open_model
from structprune.plan.key import Key
from structprune.plan.plan import Plan
from structprune.pruners.weight.sparsegpt import Sparsegpt
from structprune.solvers.hessian import factor_inverse
from structprune.solvers.matrix import MatrixToPrune, PrunedMatrix
from structprune.solvers.sparsegpt import solve_sparsegpt

SAMPLES, LENGTH, BATCH, HIDDEN, FFN = 16, 512, 8, 768, 2048
TOKENS = SAMPLES * LENGTH
# Outputs and inputs of a block's linears, and the widths of what is distinct among their inputs.
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(FFN, HIDDEN)] * 2 + [(HIDDEN, FFN)]
INPUTS = [HIDDEN, HIDDEN, HIDDEN, FFN]
GOALS = {"whole": 0.85, "statistics + solve": 0.55}

Times = dict[str, tuple[float, float]]
Decide = Callable[[str, nn.Linear, Tensor], Tensor]
# What phases have taken: seconds on the wall and of the processor; the latter hardly grow with the load.
spent: dict[str, tuple[float, float]] = {}


@contextmanager
def clock(phase: str) -> Iterator[None]:
    """Add the time that a `with` takes to what a phase has taken."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    before = spent.get(phase, (0.0, 0.0))
    spent[phase] = before[0] + time.perf_counter() - wall, before[1] + time.process_time() - cpu


class TimedSums(InputSums):
    """Our statistic, timed."""

    def __init__(self, parts: Parts, width: int, device: torch.device) -> None:
        with clock("statistics"):
            super().__init__(parts, width, device)

    def add(self, inputs: Tensor) -> None:
        """Add real tokens, shape [tokens, in]."""
        with clock("statistics"):
            super().add(inputs)


class TimedSparsegpt(Sparsegpt):
    """Our method, timed."""

    def solve(self, matrices: Sequence[MatrixToPrune], seen: Statistics) -> list[PrunedMatrix]:
        """Return masks and updated weights of the matrices that read the same input."""
        with clock("solve"):
            return super().solve(matrices, seen)


class Caught(Exception):
    """The first block was called; nothing behind it is needed."""


def plain_calibrate(model: PreTrainedModel, batches: Sequence[Batch], decide: Decide) -> None:
    """Prune a model in place, block by block; each later block sees what the pruned ones hand on.

    Args:
        model: A Llama.
        batches: Token ids.
        decide: Answers a linear's name, the linear and its Gram matrix with the new weight.
    """
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def catch(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[0], kwargs))
        raise Caught

    layers = model.model.layers
    with ExitStack() as hooks:
        hooks.callback(layers[0].register_forward_pre_hook(catch, with_kwargs=True).remove)
        for batch in batches:
            try:
                model(**batch, use_cache=False)
            except Caught:
                continue
    for index, block in enumerate(layers):
        linears = {name: one for name, one in block.named_modules() if isinstance(one, nn.Linear)}
        grams: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name, linear in linears.items():
                hooks.callback(linear.register_forward_pre_hook(partial(accumulate, grams, name)).remove)
            for hidden, kwargs in calls:
                block(hidden, **kwargs)
        for name, linear in linears.items():
            linear.weight.copy_(decide(f"model.layers.{index}.{name}", linear, grams.pop(name)))
        if index < len(layers) - 1:
            calls = [(block(hidden, **kwargs), kwargs) for hidden, kwargs in calls]


def accumulate(grams: dict[str, Tensor], name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Add X^T X of what a linear reads."""
    with clock("statistics"):
        rows = args[0].reshape(-1, args[0].shape[-1])
        if name not in grams:
            grams[name] = torch.zeros(rows.shape[1], rows.shape[1])
        grams[name].addmm_(rows.T, rows)


def taken(work: Callable[[], object]) -> Times:
    """Do some work and return what the whole, statistics, solving and the rest took."""
    spent.clear()
    with clock("whole"):
        work()
    whole, gram, solving = spent["whole"], spent["statistics"], spent["solve"]
    both = gram[0] + solving[0], gram[1] + solving[1]
    rest = whole[0] - both[0], whole[1] - both[1]
    return {**spent, "statistics + solve": both, "rest": rest}


def baseline(model: PreTrainedModel, batches: Sequence[Batch], sparsity: Sparsity) -> Times:
    """Time the baseline on a copy of the model."""

    def decide(_: str, linear: nn.Linear, gram: Tensor) -> Tensor:
        with clock("solve"):
            return plain(linear.weight, gram, sparsity)[1]

    pruned = copy.deepcopy(model)
    return taken(lambda: plain_calibrate(pruned, batches, decide))


def agreement(
    model: PreTrainedModel, batches: Sequence[Batch], plan: Plan, sparsity: Sparsity
) -> list[dict[str, float]]:
    """Compare our plan with the baseline, linear by linear on the same inputs.

    Returns:
        Per linear: the fraction of the mask that differs, in float32 and in float64, and how much of ours and
        of the baseline's differs from float64's; the largest difference of the new weights, relative to the
        largest weight, and its norm, relative too, both for our mask.
    """
    found: list[dict[str, float]] = []

    def decide(name: str, linear: nn.Linear, gram: Tensor) -> Tensor:
        weight, mask, new = (
            linear.weight,
            plan[Key(f"{name}.weight", "mask")],
            plan[Key(f"{name}.weight", "value")],
        )
        other, wanted = plain(weight, gram, sparsity)[0], plain(weight, gram, sparsity, mask)[1]
        exact = plain(weight.double(), gram.double(), sparsity)[0]
        own = solve_sparsegpt([weight.double()], factor_inverse(gram.double()), [sparsity])[0][0]
        seen = {"masks": differing(mask, other), "exact_masks": differing(own, exact)}
        seen |= {"ours": differing(mask, exact), "baseline": differing(other, exact)}
        seen["furthest"] = float((new - wanted).abs().max() / wanted.abs().max())
        seen["norm"] = float((new - wanted).norm() / wanted.norm())
        found.append(seen)
        return new

    plain_calibrate(copy.deepcopy(model), batches, decide)
    return found


def differing(one: Tensor, other: Tensor) -> float:
    """Return the fraction of two masks' entries that differ."""
    return float((one != other).double().mean())


def operations(blocks: int) -> dict[str, dict[str, float]]:
    """Count additions and multiplications, in 1e9: those that cannot be avoided, and the baseline's."""
    forward = 2 * TOKENS * sum(out * width for out, width in SHAPES) + 4 * TOKENS * LENGTH * HIDDEN
    unread = 2 * TOKENS * HIDDEN * FFN  # nobody needs the last linear's product before it is pruned
    update = sum(out * width**2 for out, width in SHAPES)
    limit = {
        "forward": (2 * blocks - 1) * forward - blocks * unread,
        "gram": blocks * TOKENS * sum(width * (width + 1) for width in INPUTS),
        # Elimination and the inverse of a triangle: a third of a cube each.
        "factor": blocks * 2 / 3 * sum(width**3 for width in INPUTS),
        "update": blocks * update,
    }
    naive = {
        "forward": (2 * blocks - 1) * forward,
        "gram": blocks * 2 * TOKENS * sum(width**2 for _, width in SHAPES),
        # Cholesky, inverse, Cholesky.
        "factor": blocks * 4 / 3 * sum(width**3 for _, width in SHAPES),
        "update": blocks * update,
    }
    return {
        side: {part: count / 1e9 for part, count in counts.items()}
        for side, counts in (("limit", limit), ("baseline", naive))
    }


def speed(size: int = 2048) -> float:
    """Measure how many 1e9 operations a second a product of matrices reaches."""
    one = torch.randn(size, size)
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        _ = one @ one
        best = min(best, time.process_time() - start)
    return 2 * size**3 / best / 1e9


def spread(values: list[float]) -> str:
    """Return the median and the range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} - {max(values):.3f})"


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    counted, rate = result["operations"], result["speed"]
    print(f"{'1e9 operations':20}" + "".join(f"{part:>10}" for part in counted["limit"]))
    for side, counts in counted.items():
        print(f"{side:20}" + "".join(f"{count:10.0f}" for count in counts.values()))
    least = {"whole": sum(counted["limit"].values())}
    least["statistics + solve"] = least["whole"] - counted["limit"]["forward"]
    print(
        f"\nmedian seconds; the limit is all operations at the {rate:.0f}e9 a second of a product of matrices"
    )
    print(
        f"{'':19} {'ours':>7} {'baseline':>9}{'ratio, over repeats':>24}{'of the processor':>24}  goal  limit"
    )
    for key in ("whole", "statistics", "solve", "statistics + solve", "rest"):
        ours, other = ([run[key] for run in result[side]] for side in ("ours", "baseline"))
        seconds = [statistics.median(wall for wall, _ in times) for times in (ours, other)]
        ratios = [one / two for (one, _), (two, _) in zip(ours, other, strict=True)]
        busy = [one / two for (_, one), (_, two) in zip(ours, other, strict=True)]
        print(
            f"{key:19} {seconds[0]:7.2f} {seconds[1]:9.2f}{spread(ratios):>24}{spread(busy):>24}"
            + (f"  {GOALS[key]:.2f} {least[key] / rate:6.2f}" if key in GOALS else "")
        )
    seen = result["agreement"]
    highest = {key: max(one[key] for one in seen) for key in seen[0]}
    equal = {key: sum(one[key] == 0 for one in seen) for key in ("exact_masks", "masks")}
    print(
        f"\nsame inputs: in float64 {equal['exact_masks']} of {len(seen)} masks are equal;"
        f"\nin float32 {equal['masks']}, the others"
        f" differ in at most {highest['masks']:.1e} of a linear\n(from float64's: ours in"
        f" {highest['ours']:.1e}, the baseline's in {highest['baseline']:.1e}); for the same mask\nthe"
        f" weights differ by at most {highest['furthest']:.1e} of the largest, {highest['norm']:.1e} in norm"
    )
    print(f"load {result['load'][0]:.2f} at the start, {result['load'][1]:.2f} at the end")


def main() -> None:
    """Time both in turn and print tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    collect.InputSums = TimedSums  # what the walk makes from now on
    pruner = TimedSparsegpt(sparsity=0.5)
    runs: dict[str, list[Times]] = {"ours": [], "baseline": []}
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        model = open_model(random_llama(Path(name), blocks=options.blocks, hidden=HIDDEN, ffn=FFN))
        assert isinstance(model, PreTrainedModel)
        tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
        batches = [{"input_ids": part} for part in torch.split(tokens, BATCH)]
        plans: list[Plan] = []
        turns: list[tuple[str, Callable[[], Times]]] = [
            ("ours", lambda: taken(lambda: plans.append(pruner.calibrate(model, batches)))),
            ("baseline", lambda: baseline(model, batches, 0.5)),
        ]
        for repeat in range(options.repeats):
            plans.clear()
            for side, run in turns if repeat % 2 else turns[::-1]:
                runs[side].append(run())
        load.append(os.getloadavg()[0])
        seen = agreement(model, batches, plans[0], 0.5)
    counted = operations(options.blocks)
    result = {**runs, "agreement": seen, "operations": counted, "speed": speed(), "load": load}
    if options.json:
        print(json.dumps(result))
    else:
        show(result)


if __name__ == "__main__":
    main()
