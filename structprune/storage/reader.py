"""A model folder, read strictly: everything about its files is checked before anything is computed.

What is checked here needs no model class; `agreement.check` compares with what the class expects.
"""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from structprune.errors import InputError
from structprune.ranks import Ranks
from structprune.storage.header import DTYPE_NAMES, MAX_NAMES, Header, TensorInfo, read_header
from structprune.storage.scan import Scan, scan_files
from structprune.storage.stored_config import read_config, refuse_quantised_tensors
from structprune.storage.tensor_file import Entry, read_tensor
from structprune.storage.unchanged import StoredFile
from structprune.storage.weight_files import compare_with_index, find_weights

logger = logging.getLogger(__name__)

# "pt" is what transformers writes; files without a note come from older tools and hold the same layout.
_FORMATS = ("pt", "")


class StoredTensors(ABC):
    """A checkpoint, wherever its tensors come from: names, dtypes, shapes, configuration, and a way to read.

    Attributes:
        folder: The folder of the files.
        root: The folder, or None where links may lead anywhere; for `safe_open.check_link`.
        config: Content of config.json, without private keys.
        patch: What plans have patched in config.json.
        tensors: Name -> file, dtype and shape, in the order of the files and of the bytes in them.
        shards: File -> names of its tensors in the order of their bytes; files sorted.
        metadata: File -> its own notes (safetensors `__metadata__`).
        index_metadata: The `metadata` of the index; None where there is none.
    """

    folder: Path
    root: Path | None
    config: dict[str, Any]
    patch: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: dict[str, tuple[str, ...]]
    metadata: dict[str, dict[str, str]]
    index_metadata: dict[str, Any] | None

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return one tensor in its stored dtype, in fresh memory.

        Raises:
            InputError: There is no such tensor, or it is damaged.
        """

    def stored_file(self, file: str) -> StoredFile | None:
        """Return the weight file that holds a shard as it stands here; None where something of it is changed.

        Args:
            file: A key of `shards`.
        """
        return None

    @property
    def layout(self) -> dict[str, list[Entry]]:
        """Return file -> (name, dtype, shape) of its tensors in order, as `ShardWriter` takes it."""
        infos = {file: [self.tensors[name] for name in names] for file, names in self.shards.items()}
        return {file: [(one.name, one.dtype, one.shape) for one in found] for file, found in infos.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of every tensor."""
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors together."""
        return sum(info.nbytes for info in self.tensors.values())


class CheckpointReader(StoredTensors):
    """The weights and the configuration of a model folder; nothing in the folder is ever changed or executed.

    Args:
        folder: The model folder: config.json and model.safetensors, or shards with an index.
        allow_external_symlinks: Accept links out of the folder (those of a Hugging Face cache always are).
        strict: Refuse tensors that the index does not name; else they are warned of.
        allow_nonfinite: Accept NaN and infinity in the weights; they are warned of.

    Attributes:
        folder: The folder as it was given.
        config: Content of config.json, without private keys.
        tensors: Name -> place, dtype and shape, in the order of the files and of the bytes in them.
        shards: File -> names of its tensors in the order of their bytes; files sorted.
        metadata: File -> its own notes (safetensors `__metadata__`).
        indexed: The folder has a model.safetensors.index.json.
        index_metadata: The `metadata` of the index; None where there is none.
        root: The folder, or None where links may lead anywhere; for `safe_open.check_link`.
        weights_folder: Where the weight files are: the folder, or another that it refers to.
        patch: What plans have patched in config.json: nothing, these are files.

    Raises:
        InputError: The folder is incomplete, damaged, quantised, an adapter, or in another format.
        EnvironmentFailure: A file may not be read, or the disk fails.
    """

    def __init__(
        self,
        folder: Path,
        *,
        allow_external_symlinks: bool = False,
        strict: bool = True,
        allow_nonfinite: bool = False,
    ) -> None:
        self.folder = folder
        self._allow_nonfinite = allow_nonfinite
        self.root = None if allow_external_symlinks else folder
        weights = find_weights(folder, self.root)
        self.weights_folder = weights.folder
        self._weights_root = None if allow_external_symlinks else weights.folder
        self.config: dict[str, Any] = read_config(folder / "config.json", self.root)
        self.patch: dict[str, Any] = {}
        self._headers: dict[str, Header] = {}
        self.tensors = {}
        for file in weights.files:
            header = read_header(weights.folder / file, self._weights_root)
            _check_format(weights.folder / file, header)
            self._headers[file] = header
            if sum(len(known.tensors) for known in self._headers.values()) > MAX_NAMES:
                raise InputError(
                    f"{folder}: more than {MAX_NAMES} tensors",
                    hint="the folder is damaged, or several models are mixed in it: fetch one again",
                )
        self.shards = {file: tuple(header.tensors) for file, header in self._headers.items()}
        compare_with_index(self.shards, weights, folder, strict=strict)
        for header in self._headers.values():
            self.tensors |= header.tensors
        if not self.tensors:
            raise InputError(f"{folder}: the weight files hold no tensors", hint="fetch the model again")
        self.metadata = {file: header.metadata for file, header in self._headers.items()}
        self.indexed = weights.weight_map is not None
        self.index_metadata = weights.index_metadata
        refuse_quantised_tensors(self.tensors, folder)
        self._warn_of_mixed_dtypes()

    def read(self, name: str) -> Tensor:
        """Return one tensor in its stored dtype, in fresh memory; the files may be read from several threads.

        Raises:
            InputError: There is no such tensor, or its file was changed after the reader was made.
            EnvironmentFailure: The memory does not suffice, or the disk fails.
        """
        if name not in self.tensors:
            raise InputError(
                f"{self.folder}: no tensor {name!r}", hint="ask for one of the names in `tensors`"
            )
        info = self.tensors[name]
        path = self.weights_folder / info.file
        return read_tensor(path, info, self._headers[info.file], self._weights_root)

    @property
    def refers(self) -> bool:
        """Tell whether the weight files are those of another folder."""
        return self.weights_folder != self.folder

    def stored_file(self, file: str) -> StoredFile:
        """Return a weight file."""
        return StoredFile(self.weights_folder / file, self._weights_root, self._headers[file])

    def scan(self, ignored: Callable[[str], bool] = lambda name: False, ranks: Ranks = Ranks()) -> Scan:
        """Read every byte of the weights once; see `Scan`.

        Args:
            ignored: Tells which tensors the model's class passes over; they may hold infinity.
            ranks: Processes that all scan at the same time, and read each byte once together.

        Raises:
            InputError: Another tensor holds NaN or infinity, and the reader does not allow it.
        """
        where = self.weights_folder, self._headers, self._weights_root
        if not self._allow_nonfinite:
            return scan_files(*where, ignored, ranks)
        scan = scan_files(*where, lambda name: True, ranks)
        bad = [name for name, found in scan.tensors.items() if found.nans or found.infinities]
        if bad := [name for name in bad if not ignored(name)]:
            logger.warning("%s: NaN or infinite values in %s", self.folder, ", ".join(bad[:5]))
        return scan

    def _warn_of_mixed_dtypes(self) -> None:
        counts = Counter(
            DTYPE_NAMES[info.dtype] for info in self.tensors.values() if info.dtype.is_floating_point
        )
        if len(counts) > 1:
            found = ", ".join(f"{name} in {count}" for name, count in counts.most_common())
            logger.warning("%s: mixed dtypes, each tensor keeps its own: %s tensors", self.folder, found)


def refusal_of_code(folder: Path) -> InputError:
    """Return the refusal of a model that needs code shipped with it and is not trusted by the user."""
    return InputError(
        f"{folder / 'config.json'}: auto_map asks to run code that is shipped with the model",
        hint="read that code, then pass --trust-remote-code, and --revision to pin what you read",
    )


def _check_format(path: Path, header: Header) -> None:
    written_by = header.metadata.get("format", "")
    if written_by not in _FORMATS:
        names = {"mlx": "MLX", "tf": "TensorFlow", "flax": "Flax", "np": "NumPy"}
        raise InputError(
            f"{path}: written in {names.get(written_by, written_by[:40])} layout, expected PyTorch's",
            hint="use the original Hugging Face folder that it was converted from",
        )
