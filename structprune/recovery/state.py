"""What a training needs to go on where it stopped: written at every check, read strictly, gone at the end.

`state-<step>.safetensors` holds what trains, AdamW's moments and counters, and the generator's state;
`best-<step>.safetensors` what trained at the best check. `state.json` names both with their hashes, and the
losses so far; to rename it into place is the one switch from an older state to a newer one. The order of the
data needs no entry: it follows from the step (see `windows.Order`).
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.optim import Optimizer

from structprune.errors import InputError
from structprune.plan.block import canonical
from structprune.ranks import Ranks
from structprune.recovery.masked_lora import MaskedLayers
from structprune.recovery.outcome import HeldOutCheck, Recovery
from structprune.recovery.sharding import copy_into, whole
from structprune.storage.durable import DurableFile, blame
from structprune.storage.header import read_header
from structprune.storage.safe_open import hash_file
from structprune.storage.strict_json import read_json
from structprune.storage.tensor_file import read_tensor, save_tensors

_SWITCH = "state.json"
# Three numbers a check: room for a million checks.
_LIMIT_BYTES = 2**26
_GENERATOR = "generator"
_PARAMETER = "parameter."
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class _Facts(BaseModel):
    """Content of state.json, besides the hash of itself; a float that Python writes is read back exactly."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    start_loss: float
    best_loss: float
    best_step: int = Field(ge=0)
    history: list[HeldOutCheck] = Field(min_length=1)
    files: dict[str, str]


class TrainingState:
    """The state of one training on disk.

    Args:
        folder: Where it lies; made when there is something to write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._switch = folder / _SWITCH
        self._files: dict[str, str] = {}

    @property
    def paths(self) -> list[Path]:
        """Return what to remove once nobody will resume, in an order that never leaves half a state."""
        return [self._switch, self.folder]

    def write(self, recovery: Recovery, layers: MaskedLayers, optimizer: Optimizer, ranks: Ranks) -> None:
        """Write the state after the check that `recovery.history` ends with.

        The first process writes. Of what is divided it gets one tensor after the other from all of them, so
        that the files are those of a training in which nothing is.

        Raises:
            EnvironmentFailure: The disk is full or may not be written; the older state is still whole.
        """
        tensors = {}
        for name, value in _tensors(layers, optimizer).items():
            full = whole(value)
            if ranks.first:
                tensors[name] = full
        if not ranks.first:
            return
        with blame(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        step = recovery.history[-1].step
        state, best = _state_of(step), _best_of(recovery)
        files = {state: save_tensors(self.folder / state, tensors)}
        if recovery.best_step == step:
            trained = {name: tensors[f"{_PARAMETER}{name}"] for name in layers.named_parameters()}
            files[best] = save_tensors(self.folder / best, trained)
        elif recovery.best_step:
            files[best] = self._files[best]
        facts = _Facts(
            start_loss=recovery.start_loss,
            best_loss=recovery.best_loss,
            best_step=recovery.best_step,
            history=recovery.history,
            files=files,
        ).model_dump()
        with DurableFile(self._switch) as file:
            file.write((canonical(facts | {"sha256": _digest(facts)}) + "\n").encode())
        self._files = files
        with blame(self.folder):
            for path in self.folder.iterdir():
                if path.name not in {_SWITCH, *files}:
                    path.unlink()

    def read(self, layers: MaskedLayers, optimizer: Optimizer) -> Recovery | None:
        """Put everything back as it was after the last check; None where none was written.

        Raises:
            InputError: A file is missing, damaged, or of another training.
        """
        if not self._switch.exists():
            return None
        with self._blamed():
            facts = self._read_facts()
            recovery = Recovery(
                start_loss=facts.start_loss,
                best_loss=facts.best_loss,
                best_step=facts.best_step,
                history=facts.history,
                steps_resumed=facts.history[-1].step,
            )
            wanted = {_state_of(recovery.steps_resumed), *([_best_of(recovery)] if facts.best_step else [])}
            if wanted != facts.files.keys():
                raise _damaged(f"{self._switch}: names {sorted(facts.files)}, expected {sorted(wanted)}")
            self._files = facts.files
            # Through the layers the best factors come back in the very layout that they had in memory.
            if facts.best_step:
                self._fill(_best_of(recovery), layers.named_parameters())
                recovery.factors = layers.factors()
            self._read_training(_state_of(recovery.steps_resumed), layers, optimizer)
        return recovery

    def _read_training(self, name: str, layers: MaskedLayers, optimizer: Optimizer) -> None:
        held = read_header(self.folder / name).tensors
        for parameter, value in layers.named_parameters().items():
            # AdamW knows nothing of a matrix that has never had a gradient.
            if f"exp_avg.{parameter}" in held:
                moments = {"exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)}
                optimizer.state[value] = {"step": torch.tensor(0.0), **moments}
        tensors = _tensors(layers, optimizer)
        self._fill(name, tensors)
        torch.set_rng_state(tensors[_GENERATOR])

    @torch.no_grad()
    def _fill(self, name: str, targets: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a file into those of the same names, one at a time; both must have the same."""
        path = self.folder / name
        if hash_file(path) != self._files[name]:
            raise _damaged(f"{path}: not the bytes that {_SWITCH} names")
        header = read_header(path)
        for tensor in sorted(header.tensors.keys() ^ targets.keys()):
            problem = "missing" if tensor in targets else "not one of this training"
            raise _damaged(f"{path}: tensor {tensor} is {problem}")
        for tensor, info in header.tensors.items():
            target = targets[tensor]
            if (info.dtype, info.shape) != (target.dtype, tuple(target.shape)):
                raise _damaged(
                    f"{path}: tensor {tensor} is {info.dtype} {list(info.shape)}, "
                    f"expected {target.dtype} {list(target.shape)}"
                )
            copy_into(target, read_tensor(path, info, header))

    def _read_facts(self) -> _Facts:
        facts = read_json(self._switch, limit_bytes=_LIMIT_BYTES)
        if not isinstance(facts, dict) or facts.pop("sha256", None) != _digest(facts):
            raise _damaged(f"{self._switch}: its content does not have the hash that it names")
        try:
            return _Facts.model_validate(facts)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise _damaged(f"{self._switch}: {place}: {first['msg']}") from None

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        """Say of whatever cannot be read that it belongs to an interrupted run, and what helps then."""
        try:
            yield
        except InputError as error:
            raise _damaged(f"{error.message}: what the interrupted run left is damaged") from error


def _damaged(message: str) -> InputError:
    return InputError(message, hint="pass --restart to forget the interrupted run and train from the start")


def _state_of(step: int) -> str:
    return f"state-{step:08d}.safetensors"


def _best_of(recovery: Recovery) -> str:
    return f"best-{recovery.best_step:08d}.safetensors"


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(facts).encode()).hexdigest()


def _tensors(layers: MaskedLayers, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return by name what shapes the next step: references, but for the generator's state."""
    found: dict[str, Tensor] = {_GENERATOR: torch.get_rng_state()}
    for name, parameter in layers.named_parameters().items():
        found[f"{_PARAMETER}{name}"] = parameter
        for moment in _MOMENTS if parameter in optimizer.state else ():
            found[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    return found
