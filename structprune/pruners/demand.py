"""What deciding takes, counted before anything runs: operations, bytes that are read, bytes that are sent.

Of several processes the busiest counts. What is sent is the sum over all of them: everything but what a
process keeps to itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add

from structprune.calibration.dispatch import owners_of
from structprune.calibration.statistics import PANEL, Parts, gradient_means
from structprune.models.arch import Linear
from structprune.models.rank_batches import RankBatches
from structprune.models.streamed import Batch
from structprune.ranks import Ranks
from structprune.solvers.effort import Effort

# Sums over tokens are float64, products of a batch and gradients float32.
SUM_BYTES, PRODUCT_BYTES = 8, 4


@dataclass(frozen=True)
class Sharing:
    """How much data is looked at, and by how many processes.

    Attributes:
        samples: Sequences.
        length: Tokens of each.
        batch_size: Sequences per forward.
        ranks: Processes, at most as many as batches.
        streamed: The weights are read anew on every walk; else once, before the first.
        routed: To how many of its experts a mixture sends each token.
    """

    samples: int
    length: int
    batch_size: int
    ranks: int = 1
    streamed: bool = False
    routed: int = 1

    @property
    def chunks(self) -> int:
        """Return how many chunks they form."""
        return self._shares[0].chunks

    @property
    def sizes(self) -> list[int]:
        """Return how many sequences each batch has."""
        whole, rest = divmod(self.samples, self.batch_size)
        return [self.batch_size] * whole + [rest] * bool(rest)

    @property
    def tokens(self) -> int:
        """Return how many tokens the process looks at that looks at most."""
        sizes = self.sizes
        return self.length * max(sum(sizes[one.number(at)] for at in range(len(one))) for one in self._shares)

    def tokens_of(self, linear: Linear) -> float:
        """Return how many tokens a linear reads; of a mixture, where its experts are asked equally often."""
        if linear.expert is None:
            return self.tokens
        return self.tokens * self.routed / len(linear.whole)

    @property
    def first_tokens(self) -> int:
        """Return how many tokens its first batch has."""
        return self.length * min(self.samples, self.batch_size)

    @property
    def _shares(self) -> list[RankBatches]:
        nothing: list[Batch] = [{} for _ in self.sizes]
        return [RankBatches(nothing, Ranks(number, self.ranks)) for number in range(self.ranks)]

    def added(self, nbytes: float) -> "Demand":
        """Return what a sum takes that all get, in whatever order: each sends it on once, and the result."""
        others = self.ranks - 1
        return Demand(sent_bytes=2 * others * nbytes, link_bytes=2 * others / self.ranks * nbytes)

    def added_for_one(self, nbytes: float) -> "Demand":
        """Return what a sum takes that one process gets: each adds up a part, and sends it to that one."""
        others = self.ranks - 1
        sent = (others + others / self.ranks) * nbytes
        return Demand(sent_bytes=sent, link_bytes=2 * others / self.ranks * nbytes)

    def told(self, nbytes: float) -> "Demand":
        """Return what it takes that one tells the others, who pass it on."""
        return Demand(sent_bytes=(self.ranks - 1) * nbytes, link_bytes=nbytes * (self.ranks > 1))

    def exchanged(self, nbytes: float) -> "Demand":
        """Return what it takes that all send each other an equal part of so many bytes at once."""
        sent = nbytes * (self.ranks - 1) / self.ranks
        return Demand(sent_bytes=sent, link_bytes=sent / self.ranks)


@dataclass(frozen=True)
class Demand:
    """What deciding takes, on a block or on all.

    Attributes:
        read_bytes: Of weights that one process reads while it walks; 0 where they are in memory.
        forward: Operations of the model itself, in its dtype, two per multiply-add.
        products: Operations of statistics in float32: Gram matrices, gradients.
        squares: Numbers whose squares are summed.
        state_bytes: Read and written of what is between the model's products.
        moved_bytes: Read and written of statistics while products of batches are added up.
        solving: What the answers take.
        sent_bytes: Of statistics, gradients and answers, all processes together.
        link_bytes: How many of these pass the process that sends or receives most, one call after the other.
    """

    read_bytes: float = 0.0
    forward: float = 0.0
    products: float = 0.0
    squares: float = 0.0
    state_bytes: float = 0.0
    moved_bytes: float = 0.0
    solving: Effort = field(default_factory=Effort)
    sent_bytes: float = 0.0
    link_bytes: float = 0.0

    def __add__(self, other: "Demand") -> "Demand":
        """Return what both take, one after the other."""
        return Demand(
            self.read_bytes + other.read_bytes,
            self.forward + other.forward,
            self.products + other.products,
            self.squares + other.squares,
            self.state_bytes + other.state_bytes,
            self.moved_bytes + other.moved_bytes,
            self.solving + other.solving,
            self.sent_bytes + other.sent_bytes,
            self.link_bytes + other.link_bytes,
        )


def distinct_inputs(found: Sequence[Linear]) -> list[list[Linear]]:
    """Return the linears of a block in groups that read the same input, as far as their places tell."""
    groups: dict[object, list[Linear]] = {}
    for one in found:
        # Each expert reads tokens of its own. In an attention or a feed-forward those share an input that
        # read the states; what reads heads or channels reads alone.
        place = one.label.rpartition(".")[0]
        key = one.label if one.expert is not None else (place, one.reads, one.weight.shape[1])
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def efforts_of(
    groups: Sequence[Sequence[Linear]], each: Sequence[Callable[[int, int], Effort]]
) -> list[Effort]:
    """Return what each of some groups of linears takes in all.

    Args:
        groups: Linears that read the same input are one.
        each: What one thing after the other takes, told all outputs of a group and how many inputs they read.
    """
    sizes = [(sum(len(one.weight) for one in group), group[0].weight.shape[1]) for group in groups]
    return [reduce(add, (effort(*size) for effort in each), Effort()) for size in sizes]


def moved_states(found: Sequence[Linear], sharing: Sharing) -> float:
    """Return how many bytes a forward reads and writes of what a block's linears read and write.

    Args:
        found: All linears of the block.
        sharing: Of how many tokens.
    """
    # Written once, read once by a product, and once more by what stands between two: norm, activation, sum.
    return sum(
        3 * one.weight.element_size() * sum(one.weight.shape) * sharing.tokens_of(one) for one in found
    )


def demand_of_sums(groups: Sequence[Sequence[Linear]], parts: Parts, sharing: Sharing) -> Demand:
    """Return what remembering the inputs of a block takes.

    Args:
        groups: Linears that read the same input are one.
        parts: What is remembered of an input.
        sharing: Of how many tokens, by how many processes.
    """
    found, experts = Demand(), 0
    for first, *_ in groups:
        width, tokens = first.weight.shape[1], sharing.tokens_of(first)
        features = width if parts & {"norm", "moments"} else 0
        sums = SUM_BYTES * sharing.chunks * (1 + features + (width if "moments" in parts else 0))
        found += Demand(squares=tokens * features) + sharing.added(sums)
        if "gram" in parts:
            # Panels on and above the diagonal: half of the matrix, and half a panel more.
            numbers = sum(min(PANEL, width - at) * (width - at) for at in range(0, width, PANEL))
            # A batch's product is written and read, the sum that it is added to as well.
            batches = sharing.tokens / sharing.length / sharing.batch_size
            moved = 2 * (PRODUCT_BYTES + SUM_BYTES) * numbers * batches
            # Only who solves what reads the input gets the sum; of an expert's the tokens themselves, unless
            # they are there already.
            sent = sharing.added_for_one(SUM_BYTES * numbers)
            if first.expert is not None:
                rows = sharing.samples * sharing.length * sharing.routed / len(first.whole)
                sent = sharing.exchanged(rows * width * first.weight.element_size())
            found += Demand(products=2 * tokens * numbers, moved_bytes=moved) + sent
        experts += first.expert is not None
    if "routing" in parts:
        found += sharing.added(SUM_BYTES * sharing.chunks * 2 * experts)
    return found


def demand_of_gradients(found: Sequence[Linear], parts: Parts, sharing: Sharing) -> Demand:
    """Return what the gradients of a block's weights take, beside the model's own backward.

    Args:
        found: All linears of the block.
        parts: What is remembered of each.
        sharing: Of how many tokens, by how many processes.
    """
    kept = len(gradient_means(parts)) * PRODUCT_BYTES * sum(one.weight.numel() for one in found)
    products = sum(2 * one.weight.numel() * sharing.tokens_of(one) for one in found)
    return Demand(products=products) + sharing.added(kept)


def demand_of_answers(
    groups: Sequence[Sequence[Linear]], efforts: Sequence[Effort], sharing: Sharing
) -> Demand:
    """Return what the answers of a block take.

    Args:
        groups: Linears that one process solves.
        efforts: What each group takes.
        sharing: How many processes divide them.
    """
    owners = owners_of(groups, Ranks(0, sharing.ranks), lambda _: [max(one.cost, 1.0) for one in efforts])
    shares = [Effort() for _ in range(sharing.ranks)]
    for (first, *_), one in zip(groups, efforts, strict=True):
        shares[owners[first.label]] += one
    busiest = max(shares, key=lambda one: one.cost)
    return Demand(solving=busiest) + sharing.told(sum(one.told_bytes for one in efforts))
