"""Perplexity of a model on windows of tokens, and its divergence from another model on the same windows.

All figures are means over scored tokens; log-softmax runs in float32, sums in float64. Standard errors come
from windows, paired: both models score the same ones. Tokens of one window depend on each other and would
give errors that are too small.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice, repeat, zip_longest

import torch
from torch import Tensor
from torch.nn import functional

from structprune.calibration.data import begin, cut
from structprune.errors import InputError, QualityError
from structprune.models.outputs import Output, outputs, per_token
from structprune.models.streamed import Batch, Model
from structprune.progress import Progress, silent
from structprune.ranks import Ranks

# Hidden states that a streamed model keeps between two blocks; past it the model is read once more.
HIDDEN_BYTES = 2**29
NOT_FINITE = "the numbers overflow, or the model is broken: compute with --dtype float32, or prune less"


@dataclass(frozen=True)
class Windows:
    """What is scored: token ids, and from where on in each window.

    Attributes:
        inputs: Token ids, shape [windows, tokens], int64.
        starts: The first scored position of each window, at least 1; earlier ones are context.
    """

    inputs: Tensor
    starts: list[int]

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return sum(self.inputs.shape[1] - start for start in self.starts)


@dataclass
class Scores:
    """Sums per window, in order.

    Attributes:
        tokens: Tokens scored.
        model: Negative log-likelihood under the model, in nats.
        dense: The same under the model it is compared with; empty without one.
        kl: KL(dense || model), in nats; empty without dense.
        agree: Tokens at which both models rank the same token first; empty without dense.
    """

    tokens: list[int] = field(default_factory=list)
    model: list[float] = field(default_factory=list)
    dense: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agree: list[float] = field(default_factory=list)

    def mean(self, sums: list[float]) -> float:
        """Return the mean per token of some window sums."""
        return math.fsum(sums) / sum(self.tokens) if all(map(math.isfinite, sums)) else math.nan

    def error(self, sums: list[float]) -> float:
        """Return the standard error of that mean over windows; NaN for a single window."""
        count, mean = len(sums), self.mean(sums)
        if count < 2 or math.isnan(mean):
            return math.nan
        spread = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, self.tokens, strict=True))
        return math.sqrt(spread * count / (count - 1)) / sum(self.tokens)


def windows_of(ids: Tensor, length: int, *, stride: int | None = None, first: int | None = None) -> Windows:
    """Cut a text into windows of exactly `length`; what is left at the end is not scored.

    Args:
        ids: Token ids of the text, shape [tokens].
        length: Tokens per window, the one of `first` included.
        stride: Tokens of text from one window's beginning to the next. By default none overlap; with a
            smaller one every window scores only the tokens that the one before it has not.
        first: A beginning-of-sequence token for every window. Without it the first token of a text, and of
            each window that does not overlap the one before it, has nothing to be predicted from and is not
            scored.
    """
    extra = 0 if first is None else 1
    body = length - extra
    step = min(stride or body, body)
    cuts = begin(cut(ids, body, step), first)
    later = max(body - step + extra, 1)
    return Windows(cuts, [1 if index == 0 else later for index in range(len(cuts))])


@torch.no_grad()
def score(
    model: Model,
    text: Windows,
    *,
    dense: Model | None = None,
    say: Callable[[Model, Sequence[Batch]], Iterator[Output]] | None = None,
    batch_size: int = 8,
    name: str = "the text",
    ranks: Ranks = Ranks(),
    progress: Progress = silent,
) -> Scores:
    """Score a text under a model and, in the same run, under the model it was made from.

    Args:
        model: In memory, or streamed.
        text: What to score.
        dense: The model to compare with; in memory or streamed, whatever `model` is.
        say: Yields what the dense model says of batches, where it need not be asked again.
        batch_size: Windows per forward.
        name: What to call the text in an error.
        ranks: Those who share the batches; each returns the scores of all windows.
        progress: Told (stage, batches scored, batches) of this process's own.

    Raises:
        InputError: A token id is outside a model's vocabulary, or the two vocabularies differ.
        QualityError: A loss is not finite; no batch is run after the first that has one.
    """
    _check_vocabulary(text.inputs, model, dense)
    batches: list[Batch] = [{"input_ids": part.clone()} for part in torch.split(text.inputs, batch_size)]
    share = ranks.portion(len(batches))
    starts = text.starts[share.start * batch_size :]
    tell = partial(progress, f"perplexity on {name}")
    own = _score_batches(model, batches[share.start : share.stop], starts, dense, say or outputs, tell)
    scores = Scores()
    for found, _ in ranks.tell_each(asdict(own)):
        for which, sums in found.items():
            getattr(scores, which).extend(sums)
    _refuse_not_finite(scores, name)
    return scores


def _score_batches(
    model: Model,
    batches: Sequence[Batch],
    starts: Sequence[int],
    dense: Model | None,
    say: Callable[[Model, Sequence[Batch]], Iterator[Output]],
    tell: Callable[[int, int], None],
) -> Scores:
    """Return the scores of the windows in some batches, up to the first with a loss that is not finite."""
    scores, done = Scores(), 0
    if not batches:
        return scores
    tell(done, len(batches))
    config = model.config.get_text_config()
    length = batches[0]["input_ids"].numel()
    held = max(1, HIDDEN_BYTES // (length * config.hidden_size * 4))
    left = iter(starts)
    for low in range(0, len(batches), held):
        group = batches[low : low + held]
        others: Iterator[Output | None] = repeat(None, len(group))
        if dense is not None:
            others = say(dense, group)
        for batch, mine, other in zip(group, outputs(model, group), others, strict=True):
            ids = batch["input_ids"]
            _add(scores, ids, list(islice(left, len(ids))), mine, other)
            if not all(map(math.isfinite, scores.model + scores.dense)):
                return scores
            tell(done := done + 1, len(batches))
    return scores


def _refuse_not_finite(scores: Scores, name: str) -> None:
    for window, losses in enumerate(zip_longest(scores.model, scores.dense, fillvalue=0.0)):
        for which, loss in zip(("model", "dense model"), losses, strict=True):
            if not math.isfinite(loss):
                raise QualityError(
                    f"the loss of the {which} on {name} is not finite: {loss} in window {window}",
                    hint=NOT_FINITE,
                )


def _check_vocabulary(ids: Tensor, model: Model, dense: Model | None) -> None:
    sizes = [int(one.config.get_text_config().vocab_size) for one in (model, dense) if one is not None]
    if len(set(sizes)) > 1:
        raise InputError(
            f"the model has a vocabulary of {sizes[0]}, the one it is compared with of {sizes[1]}",
            hint="compare with the dense model that this one was pruned from",
        )
    if ids.numel() and int(ids.max()) >= sizes[0]:
        raise InputError(
            f"the tokenizer gives token {int(ids.max())}, the model has a vocabulary of {sizes[0]}",
            hint="use the tokenizer that belongs to the model",
        )


def _add(scores: Scores, ids: Tensor, starts: list[int], mine: Output, other: Output | None) -> None:
    """Add the windows of one batch: `ids` [windows, tokens], scored from their `starts` on."""
    scored = torch.arange(ids.shape[1]) >= torch.tensor(starts)[:, None]
    targets = ids[scored].to(mine.states.device)
    models = [mine] if other is None else [mine, other]
    # Each token is predicted from the states of the one before it.
    states = [one.states[:, :-1][scored[:, 1:].to(one.states.device)] for one in models]
    figures = per_token(partial(_figures, [one.head for one in models]), mine.vocabulary, targets, *states)
    counts = scored.sum(dim=1).tolist()
    sums = torch.stack([part.double().sum(dim=1) for part in torch.split(figures, counts, dim=1)]).T.tolist()
    scores.tokens += counts
    for total, found in zip((scores.model, scores.dense, scores.kl, scores.agree), sums, strict=False):
        total += found


def _figures(heads: Sequence[Callable[[Tensor], Tensor]], targets: Tensor, *states: Tensor) -> Tensor:
    """Return what is summed of each token, in the order of `Scores`, shape [1 or 4, tokens]."""
    log_q, loss, mine = _judged(heads[0](states[0]), targets)
    if len(heads) == 1:
        return loss[None]
    log_p, dense_loss, other = _judged(heads[1](states[1]).to(targets.device), targets)
    # In place, here and below: with a large vocabulary each copy counts.
    log_ratio = log_q.neg_().add_(log_p)
    # A token that the dense model rules out (-inf) adds nothing, but 0 * inf would be NaN.
    log_ratio.masked_fill_(log_p == -math.inf, 0.0)
    kl = log_p.exp_().mul_(log_ratio).sum(dim=-1)
    return torch.stack([loss, dense_loss, kl, (mine == other).float()])


def _judged(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities [tokens, vocabulary], and per token the loss in nats and the likeliest."""
    log = functional.log_softmax(logits.float(), dim=-1)
    return log, functional.nll_loss(log, targets, reduction="none"), logits.argmax(dim=-1)
