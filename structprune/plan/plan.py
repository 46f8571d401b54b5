"""A plan: what a pruner decided, as a value with a name and a file.

On disk a plan is a folder: `plan.json` (method, config, hashes, facts, id) beside one small safetensors
file per block. Blocks are written as the walk goes, so a killed run resumes after its last whole block,
and nothing the size of the model is ever held in memory.

Keys are `"<stored tensor name>:<kind>"`; names and layouts are those of the checkpoint files, so a plan
survives renamings inside transformers and can be read without building a model.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from structprune.errors import InputError
from structprune.plan.block import IN_THE_WEIGHTS, PlanBlock, Read, canonical
from structprune.storage.durable import DurableFile
from structprune.storage.strict_json import read_json

FORMAT = 1
# A plan.json holds a few facts per matrix; far below this even for a model with thousands of experts.
PLAN_JSON_LIMIT = 256 * 2**20


def architecture_hash(model_type: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the hash that ties a plan to an architecture: model type, stored tensor names and shapes."""
    rows = [[name, list(shapes[name])] for name in sorted(shapes)]
    return hashlib.sha256(canonical([model_type, rows]).encode()).hexdigest()


class Plan(Mapping[str, Tensor]):
    """What a pruner decided about one architecture; a mapping from key to tensor.

    Masks are returned as bool tensors in the stored tensor's shape (True = kept); other kinds as written.
    A plan read from disk keeps one block's tensors in memory at a time.

    Args:
        method: The pruner's name.
        config: The pruner's fields.
        architecture: Hash of the model type and the stored names and shapes before the stage.
        weights: Hash of the weights the decision was made on.
        facts: What was measured on the way.
        blocks: The decisions, block by block.
        decides: Which of the blocks' keys are the plan's.
    """

    def __init__(
        self,
        method: str,
        config: Mapping[str, Any],
        architecture: str,
        weights: str,
        facts: Mapping[str, Any],
        blocks: list[PlanBlock],
        *,
        decides: Callable[[str], bool] = lambda key: True,
    ) -> None:
        self.method = method
        self.config = dict(config)
        self.architecture = architecture
        self.weights = weights
        self.facts = dict(facts)
        self.blocks = blocks
        self._block_of = {key: block for block in blocks for key in block.shapes if decides(key)}
        self._open: PlanBlock | None = None  # the one block whose tensors are in memory

    @property
    def id(self) -> str:
        """Return the hash of everything the plan decides."""
        parts = [
            self.method,
            self.config,
            self.architecture,
            self.weights,
            [block.digest for block in self.blocks],
        ]
        return hashlib.sha256(canonical(parts).encode()).hexdigest()

    def __getitem__(self, key: str) -> Tensor:
        """Return the tensor of `key`."""
        block = self._block_of[key]
        if self._open is not block and self._open is not None:
            self._open.release()
        self._open = block
        return block[key]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys, block by block."""
        return iter(self._block_of)

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._block_of)

    def beside_weights(self) -> "Plan":
        """Return the same plan without what is in the weights of the model that it was applied to."""
        parts = (self.method, self.config, self.architecture, self.weights, self.facts, self.blocks)
        return Plan(*parts, decides=lambda key: key.rpartition(":")[2] not in IN_THE_WEIGHTS)

    def read_from(self, read: Read) -> None:
        """Say how the tensors of the pruned model are read, for decisions that are kept there."""
        for block in self.blocks:
            block.read = read

    def save(self, folder: Path) -> None:
        """Write the plan into `folder`, block by block, `plan.json` last."""
        writer = PlanWriter(folder, self.method, self.config, self.architecture, self.weights)
        for block in self.blocks[writer.finished :]:
            writer.add(block)
            block.release()
        writer.finish(self.facts)

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        """Read a plan that `save` or a finished `PlanWriter` wrote; nothing is executed.

        Raises:
            InputError: A file is missing, damaged, or not what `plan.json` says.
        """
        path = folder / "plan.json"
        if not path.is_file():
            raise InputError(
                f"{folder}: holds no plan.json", hint="a plan folder is written by `structprune prune`"
            )
        head = read_json(path, limit_bytes=PLAN_JSON_LIMIT)
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise InputError(f"{path}: not a plan of format {FORMAT}", hint="written by another version?")
        try:
            count = int(head["blocks"])
            parts = head["method"], head["config"], head["architecture"], head["weights"], head["facts"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: lacks {error}", hint="the file was changed; prune again") from None
        plan = cls(*parts, [PlanBlock.load(folder / block_file(index)) for index in range(count)])
        if plan.id != head.get("id"):
            raise InputError(f"{path}: id {head.get('id')} does not match the plan's content {plan.id}")
        return plan


def block_file(index: int) -> str:
    """Return the file name of one block's decisions."""
    return f"block-{index:04d}.safetensors"


class PlanWriter:
    """Collects a plan block by block; with a folder, each block is durable before the next begins.

    A folder that already holds leading blocks of the same run continues after them: `finished` counts them.
    The caller answers for it being the same run (the partial folder's name carries its fingerprint).

    Args:
        folder: Where to write, or None to keep the plan in memory.
        method: The pruner's name.
        config: The pruner's fields.
        architecture: Hash of the architecture.
        weights: Hash of the source's weights.
        decided: Told the number of decided blocks after each of them.
    """

    def __init__(
        self,
        folder: Path | None,
        method: str,
        config: Mapping[str, Any],
        architecture: str,
        weights: str,
        *,
        decided: Callable[[int], None] | None = None,
    ) -> None:
        self.folder = folder
        self._decided = decided
        self._head = (method, dict(config), architecture, weights)
        self.blocks: list[PlanBlock] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            while (path := folder / block_file(len(self.blocks))).is_file():
                self.blocks.append(PlanBlock.load(path))

    @property
    def finished(self) -> int:
        """Return how many blocks are decided."""
        return len(self.blocks)

    def write(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Add the next block's decisions; masks are given as bool tensors in the stored shape."""
        path = None if self.folder is None else self.folder / block_file(len(self.blocks))
        self.blocks.append(PlanBlock.make(tensors, facts, path))
        if self._decided is not None:
            self._decided(len(self.blocks))

    def add(self, block: PlanBlock) -> None:
        """Add the decisions of another plan's block as they are."""
        path = None if self.folder is None else self.folder / block_file(len(self.blocks))
        self.blocks.append(block if path is None else block.save(path))

    def so_far(self) -> Plan:
        """Return the plan of the blocks decided until now."""
        return Plan(*self._head, {}, self.blocks)

    def finish(self, facts: Mapping[str, Any]) -> Plan:
        """Close the plan; with a folder, write `plan.json` as the last file."""
        plan = Plan(*self._head, facts, list(self.blocks))
        if self.folder is not None:
            head = {"format": FORMAT, "method": plan.method, "config": plan.config, "facts": plan.facts}
            head |= {"architecture": plan.architecture, "weights": plan.weights}
            head |= {"blocks": len(plan.blocks), "id": plan.id}
            with DurableFile(self.folder / "plan.json") as file:
                file.write((json.dumps(head, indent=1, sort_keys=True) + "\n").encode())
        return plan
