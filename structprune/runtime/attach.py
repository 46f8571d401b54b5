"""What lets a model run with fewer tokens, or with all again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel

from structprune.models.streamed import Model
from structprune.runtime.drop import Drop
from structprune.runtime.engine import Engine

_ATTRIBUTE = "_structprune_engine"


def attach(model: PreTrainedModel, key: str, drops: Sequence[Drop]) -> None:
    """Let a model run with fewer tokens from now on; the same key again changes nothing.

    Args:
        model: In memory.
        key: What names the decision, such as a plan's id.
        drops: Where tokens are dropped.

    Raises:
        UsageError: Tokens of this model cannot be dropped; says why.
    """
    engine = engine_of(model)
    if engine is None:
        engine = Engine(model)
        engine.install()
        object.__setattr__(model, _ATTRIBUTE, engine)
    engine.drops.setdefault(key, [*drops])


def detach(model: PreTrainedModel, key: str | None = None) -> None:
    """Let a model run with all tokens again.

    Args:
        model: In memory.
        key: Only this decision is undone; None for every one.
    """
    engine = engine_of(model)
    if engine is None:
        return
    if key is not None:
        engine.drops.pop(key, None)
    if key is None or not engine.drops:
        engine.remove()
        object.__delattr__(model, _ATTRIBUTE)


def engine_of(model: object) -> Engine | None:
    """Return what runs a model with fewer tokens; None where nothing does."""
    found = vars(model).get(_ATTRIBUTE)
    assert found is None or isinstance(found, Engine)
    return found


@contextmanager
def paused(model: Model) -> Iterator[Model]:
    """Let this thread run a model with all its tokens, for the length of a `with`."""
    engine = engine_of(model)
    if engine is None:
        yield model
        return
    with engine.paused():
        yield model
