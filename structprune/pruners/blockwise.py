"""The passes that a weight pruner makes over a model: one to measure it, one to solve it block by block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from structprune.calibration.collect import Collected, collect
from structprune.calibration.notebook import Notebook
from structprune.calibration.statistics import InputNorm
from structprune.decide.budgets.budget import Budget
from structprune.models import edit
from structprune.models.arch import Linear, arch_of, blocks, linears
from structprune.models.backward import backward
from structprune.models.gradients import Norm
from structprune.models.identity import names_of, skeleton
from structprune.models.streamed import Batch, Model
from structprune.models.walk import Block, Walk, resident
from structprune.plan.plan import PlanWriter
from structprune.solvers.solution import Solution, Task

T = TypeVar("T")
R = TypeVar("R")
Choose = Callable[[int, Sequence[Linear]], list[Linear]]
Measured = tuple[Block, Collected]


def measure(
    model: Model, batches: Sequence[Batch], choose: Choose, budget: Budget, notes: Notebook
) -> list[float]:
    """Walk through the dense model and return the number that a budget remembers of each block.

    Args:
        model: In memory or streamed.
        batches: Calibration data.
        choose: Returns the linears of a block that are pruned.
        budget: Measures a block.
        notes: Holds what an interrupted run measured, and all that this one does.
    """
    found: list[float] = []
    for block in Walk(model, batches):
        chosen = choose(block.index, block.linears)
        if notes.has(block.index) or not chosen:
            block.advance()
        else:
            seen = collect(block, chosen, InputNorm, advance=True).statistics
            number = budget.measure([one.weight for one in chosen], [seen[one.label] for one in chosen])
            notes.write(block.index, {"measured": torch.tensor(number, dtype=torch.float64)})
        noted = notes.read(block.index)
        found.append(float(noted["measured"]) if noted else 0.0)
    return found


def measure_gradients(
    model: Model,
    batches: Sequence[Batch],
    choose: Choose,
    norm: Norm,
    notes: Notebook,
    *,
    spill: Path | None = None,
) -> None:
    """Walk backward through the dense model and note the size of every chosen weight's gradient.

    Args:
        model: In memory or streamed.
        batches: Calibration data.
        choose: Returns the linears of a block that are pruned.
        norm: How the gradients of the samples are added up.
        notes: Holds what an interrupted run measured; nothing is done when that is all.
        spill: Where hidden states wait for their turn; None for a temporary folder.
    """
    if all(notes.has(index) for index in range(len(blocks(model)))):
        return
    for block, found in backward(model, batches, norms=(norm,), folder=spill):
        chosen = [linear.label for linear in choose(block.index, block.linears)]
        notes.write(block.index, {label: getattr(found[label], norm) for label in chosen})


def walk_weights(model: Model, finished: int) -> Iterator[Measured]:
    """Yield every block that is not decided yet, without any data.

    Args:
        model: In memory or streamed.
        finished: How many blocks are decided.
    """
    arch = arch_of(skeleton(model))
    for index, (prefix, module) in enumerate(blocks(model)):
        if index >= finished:
            with resident(model, prefix):
                yield Block(index, prefix, module, linears(prefix, module, arch)), Collected()


def walk_data(
    model: Model,
    batches: Sequence[Batch],
    writer: PlanWriter,
    choose: Choose,
    statistic: type[InputNorm],
    *,
    dense: bool,
) -> Iterator[Measured]:
    """Yield every undecided block with its statistics, and advance through it once it is decided.

    Args:
        model: In memory or streamed.
        batches: Calibration data.
        writer: Where the caller writes each block's decision before it asks for the next block.
        choose: Returns the linears of a block that are pruned.
        statistic: What is remembered of their inputs.
        dense: Later blocks see the outputs of dense blocks, not of pruned ones.
    """
    last = len(blocks(model)) - 1
    for block in Walk(model, batches):
        if block.index >= writer.finished:
            yield block, collect(block, choose(block.index, block.linears), statistic, advance=dense)
            if dense:
                continue
        if block.index < last:
            decided = writer.blocks[block.index]
            if dense:
                block.advance()
                continue
            with edit.temporarily(block.module, block.prefix, decided, names_of(model)):
                block.advance()
            decided.release()


def solve_block(
    tasks: Sequence[Task],
    statistics: Mapping[str, InputNorm],
    solve: Callable[[Sequence[Task], InputNorm | None], list[Solution]],
) -> dict[str, Solution]:
    """Return what becomes of a block's matrices, by label.

    Args:
        tasks: The matrices.
        statistics: What is remembered of their inputs; those that read the same one share an object.
        solve: Answers for matrices that read the same input.
    """
    shared: dict[int, list[Task]] = {}
    for number, task in enumerate(tasks):
        stat = statistics.get(task.label)
        shared.setdefault(-number if stat is None else id(stat), []).append(task)
    groups = list(shared.values())
    solved = side_by_side(lambda group: solve(group, statistics.get(group[0].label)), groups)
    return {
        task.label: solution
        for group, solutions in zip(groups, solved, strict=True)
        for task, solution in zip(group, solutions, strict=True)
    }


def side_by_side(work: Callable[[T], R], jobs: Sequence[T]) -> list[R]:
    """Do independent work, each job with one thread of those that PyTorch may use; return the results."""
    threads = torch.get_num_threads()
    if threads == 1 or len(jobs) < 2:
        return [work(job) for job in jobs]
    try:
        # One thread a job: to split the small steps of a solver among threads costs more than it gains.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, jobs))
    finally:
        torch.set_num_threads(threads)
