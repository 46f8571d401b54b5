"""A plan: what a pruner decided, as a value with a name and a file.

On disk a plan is a folder: `plan.json` (method, config, hashes, facts, promises, patch, id) beside one small
safetensors file per block. Blocks are written as the walk goes, so a killed run resumes after its last whole
block, and nothing the size of the model is ever held in memory.

Keys are `Key(<stored tensor name>, <kind>)`; names and layouts are those of the checkpoint files, so a plan
survives renamings inside transformers and can be read without building a model.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from structprune.errors import InputError
from structprune.plan.block import PlanBlock, Read, canonical
from structprune.plan.key import RESHAPING, WRITTEN, Key, check_key
from structprune.plan.origin import Architecture, Origin
from structprune.plan.promise import Promises
from structprune.storage.durable import DurableFile
from structprune.storage.strict_json import read_json

CHANGED = "the file was changed; prune again"

PLAN_FILE = "plan.json"
# 2: keys of six edits, promises, a patch of config.json.
FORMAT = 2
# A plan.json holds a few facts per matrix; far below this even for a model with thousands of experts.
PLAN_JSON_LIMIT = 256 * 2**20


class PlanHead(BaseModel):
    """Content of plan.json: a plan without its tensors; `format` is looked at before."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: int
    method: str
    config: dict[str, Any]
    architecture: str
    weights: str
    facts: dict[str, Any]
    promises: Promises | None
    patch: dict[str, Any]
    blocks: Annotated[int, Field(ge=0)]
    id: str
    # Not in the id: the architecture, which is, is their hash.
    before: Architecture | None = None


class Plan(Mapping[Key, Tensor]):
    """What a pruner decided about one architecture; a mapping from key to tensor.

    Masks are returned as bool tensors in the stored tensor's shape (True = kept); other kinds as written.
    A plan read from disk keeps one block's tensors in memory at a time.

    Args:
        origin: Who decided, and on what.
        blocks: The decisions, block by block.
        facts: What was measured on the way.
        promises: What the files must show; None where nothing leaves.
        patch: Keys of config.json with their new values; a group of keys is patched key by key.
        decides: Which of the blocks' keys are the plan's.

    Attributes:
        shapes: Shape of every key's tensor.
    """

    def __init__(
        self,
        origin: Origin,
        blocks: list[PlanBlock],
        *,
        facts: Mapping[str, Any] | None = None,
        promises: Promises | None = None,
        patch: Mapping[str, Any] | None = None,
        decides: Callable[[Key], bool] = lambda key: True,
    ) -> None:
        self.origin = origin
        self.blocks = blocks
        self.facts = dict(facts or {})
        self.promises = promises
        # In the order in which it is read back, so that config.json has the same bytes either way.
        self.patch: dict[str, Any] = json.loads(canonical(patch or {}))
        self._block_of = {key: block for block in blocks for key in block.shapes if decides(key)}
        self.shapes = {key: block.shapes[key] for key, block in self._block_of.items()}
        self._open: PlanBlock | None = None  # the one block whose tensors are in memory

    @property
    def method(self) -> str:
        """Return the name of the pruner."""
        return self.origin.method

    @property
    def config(self) -> dict[str, Any]:
        """Return the pruner's fields."""
        return dict(self.origin.config)

    @property
    def architecture(self) -> str:
        """Return the hash of the architecture that the plan fits."""
        return self.origin.architecture

    @property
    def weights(self) -> str:
        """Return the hash of the weights that the decision was made on."""
        return self.origin.weights

    @property
    def id(self) -> str:
        """Return the hash of everything the plan decides and promises."""
        parts = [
            self.method,
            self.config,
            self.architecture,
            self.weights,
            [block.digest for block in self.blocks],
            self.promises.model_dump(mode="json") if self.promises else None,
            self.patch,
        ]
        return hashlib.sha256(canonical(parts).encode()).hexdigest()

    def __getitem__(self, key: Key) -> Tensor:
        """Return the tensor of `key`."""
        block = self._block_of[check_key(key)]
        if self._open is not block and self._open is not None:
            self._open.release()
        self._open = block
        return block[key]

    def __contains__(self, key: object) -> bool:
        """Tell whether there is a decision of this key; nothing is read or unpacked."""
        return check_key(key) in self._block_of

    def __iter__(self) -> Iterator[Key]:
        """Iterate over the keys, block by block."""
        return iter(self._block_of)

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._block_of)

    def beside_weights(self) -> "Plan":
        """Return the same plan without what is in the weights of the model that it was applied to."""
        return Plan(
            self.origin,
            self.blocks,
            facts=self.facts,
            promises=self.promises,
            patch=self.patch,
            decides=lambda key: key.edit not in WRITTEN,
        )

    def read_from(self, read: Read) -> None:
        """Say how the tensors of the pruned model are read, for decisions that are kept there."""
        for block in self.blocks:
            block.read = read

    def save(self, folder: Path) -> None:
        """Write the plan into `folder`, block by block, `plan.json` last."""
        writer = PlanWriter(folder, self.origin)
        for block in self.blocks[writer.finished :]:
            writer.add(block)
            block.release()
        writer.finish(self.facts, promises=self.promises, patch=self.patch)

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        """Read a plan that `save` or a finished `PlanWriter` wrote; nothing is executed.

        Raises:
            InputError: A file is missing, damaged, of another format, or not what `plan.json` says.
        """
        said = read_head(folder)
        origin = Origin(said.method, said.config, said.architecture, said.weights, said.before)
        blocks = [PlanBlock.load(folder / block_file(index)) for index in range(said.blocks)]
        plan = cls(origin, blocks, facts=said.facts, promises=said.promises, patch=said.patch)
        if plan.id != said.id:
            raise InputError(
                f"{folder / PLAN_FILE}: id {said.id[:80]} does not match the plan's content {plan.id}",
                hint=CHANGED,
            )
        return plan


def read_head(folder: Path) -> PlanHead:
    """Return what a plan's folder says of the plan, without reading a tensor.

    Raises:
        InputError: It is missing, damaged, or of another format.
    """
    path = folder / PLAN_FILE
    if not path.is_file():
        raise InputError(
            f"{folder}: holds no {PLAN_FILE}", hint="a plan folder is written by `structprune prune`"
        )
    head = read_json(path, limit_bytes=PLAN_JSON_LIMIT)
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        found = head.get("format") if isinstance(head, dict) else None
        raise InputError(
            f"{path}: a plan of format {found}, this structprune reads format {FORMAT}",
            hint="written by another version: prune again with its recipe, structprune/recipe.yaml",
        )
    try:
        said = PlanHead.model_validate(head)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {place}: {first['msg']}", hint=CHANGED) from None
    if said.before is not None and said.before.hash != said.architecture:
        raise InputError(f"{path}: before: not the architecture that it names", hint=CHANGED)
    return said


def block_file(index: int) -> str:
    """Return the file name of one block's decisions."""
    return f"block-{index:04d}.safetensors"


class PlanWriter:
    """Collects a plan block by block; with a folder, each block is durable before the next begins.

    A folder that already holds leading blocks of the same run continues after them: `finished` counts them.
    The caller answers for it being the same run (the partial folder's name carries its fingerprint).

    Args:
        folder: Where to write, or None to keep the plan in memory.
        origin: Who decides, and on what.
        decided: Told the number of decided blocks after each of them.
        measured: Told (done, total) of looks at the data on which all blocks wait.
    """

    def __init__(
        self,
        folder: Path | None,
        origin: Origin,
        *,
        decided: Callable[[int], None] | None = None,
        measured: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.folder = folder
        self.origin = origin
        self._decided = decided
        self.measured = measured
        self.blocks: list[PlanBlock] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            while (path := folder / block_file(len(self.blocks))).is_file():
                self.blocks.append(PlanBlock.load(path))

    @property
    def finished(self) -> int:
        """Return how many blocks are decided."""
        return len(self.blocks)

    def write(self, tensors: Mapping[Key, Tensor], facts: Mapping[str, Any]) -> None:
        """Add the next block's decisions; masks are given as bool tensors in the stored shape."""
        path = None if self.folder is None else self.folder / block_file(len(self.blocks))
        self.blocks.append(PlanBlock.make(tensors, facts, path))
        if self._decided is not None:
            self._decided(len(self.blocks))

    def add(self, block: PlanBlock) -> None:
        """Add the decisions of another plan's block as they are."""
        path = None if self.folder is None else self.folder / block_file(len(self.blocks))
        self.blocks.append(block if path is None else block.save(path))

    def finish(
        self,
        facts: Mapping[str, Any],
        *,
        promises: Promises | None = None,
        patch: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Close the plan; with a folder, write `plan.json` as the last file.

        Args:
            facts: What was measured; JSON values only.
            promises: What the files must show once the plan is carried out.
            patch: Keys of config.json with their new values; JSON values only.
        """
        plan = Plan(self.origin, list(self.blocks), facts=facts, promises=promises, patch=patch)
        if self.folder is not None:
            head = {
                "format": FORMAT,
                "method": plan.method,
                "config": plan.config,
                "architecture": plan.architecture,
                "weights": plan.weights,
                "facts": plan.facts,
                "promises": promises.model_dump(mode="json") if promises else None,
                "patch": plan.patch,
                "blocks": len(plan.blocks),
                "id": plan.id,
            }
            # Once tensors are smaller or gone, nothing else tells what they were.
            if self.origin.before is not None and any(key.edit in RESHAPING for key in plan):
                head["before"] = self.origin.before.model_dump(mode="json")
            with DurableFile(self.folder / PLAN_FILE) as file:
                file.write((json.dumps(head, indent=1, sort_keys=True) + "\n").encode())
        return plan
