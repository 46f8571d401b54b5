"""Names in the checkpoint files <-> names in the model, and the two layouts of a tensor.

Most tensors keep their name. Others are renamed (GPT-2 files without "transformer.", old LLaVA prefixes) or
converted (one file tensor per expert, one 3-D parameter in memory). A model whose files use its own names
never reaches transformers' internals.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from structprune.errors import InputError
from structprune.models.conversion import Conversion, Part, Shape, Slot, is_numbered

OTHER_MODEL = "give the tensors of this very model: one with the same tensor names and shapes"


class Names:
    """The two namings of one model's tensors, and the conversion between the two layouts.

    Args:
        skeleton: The model; its parameters may be on the meta device, tied weights must be tied.
        stored: Names and shapes found in the files; None stands for what `save_pretrained` would write.

    Attributes:
        skeleton: The model.
        stored_of: State-dict name -> names in the files that it is made of; absent where the files lack it.
        module_of: Name in the files -> state-dict name (the first, where one file tensor makes several).
        aliases: State-dict name of a tied weight -> the name it is an alias of.
        duplicates: Names in the files that repeat a tied weight -> the name they must be equal to.

    Raises:
        EnvironmentFailure: The installed transformers lacks an internal function that this model needs.
    """

    def __init__(self, skeleton: PreTrainedModel, stored: Mapping[str, Shape] | None = None) -> None:
        self.skeleton = skeleton
        self._shapes: dict[str, Shape] = {
            key: tuple(value.shape) for key, value in skeleton.state_dict().items()
        }
        self._lazy: Conversion | None = None
        self.aliases = _tied(skeleton)
        parts = self._find_parts(list(self._canonical() if stored is None else stored))
        own = {name: part for part in parts for name in part.modules}
        self.module_of: dict[str, str] = {name: part.modules[0] for part in parts for name in part.stored}
        self.duplicates: dict[str, str] = {
            own[alias].stored[0]: own[main].stored[0]
            for alias, main in self.aliases.items()
            if alias in own and main in own
        }
        self._parts: dict[str, Part] = {}
        for name in self._shapes:
            found = next((own[twin] for twin in (name, *self.twins(name)) if twin in own), None)
            if found is not None:
                self._parts[name] = found
        self.stored_of: dict[str, tuple[str, ...]] = {name: part.stored for name, part in self._parts.items()}

    def twins(self, name: str) -> tuple[str, ...]:
        """Return every state-dict name of the same parameter, the one it is saved under first."""
        main = self.aliases.get(name, name)
        return (main, *(alias for alias, of in self.aliases.items() if of == main))

    def stored_of_linear(self, name: str, expert: int | None = None) -> tuple[str, ...]:
        """Return the names in the files that a matrix is made of; of an expert stored apart, its own only.

        Args:
            name: State-dict name of its parameter.
            expert: Its number, where the parameter holds all experts of a mixture.
        """
        part = self._part(name)
        if expert is None or not part.slots:
            return part.stored
        # Said by the pattern, not tried with marked tensors: a large mixture has 12 288 matrices.
        found = zip(part.stored, part.slots, strict=True)
        return tuple(one for one, slot in found if not is_numbered(slot) or slot[1] == expert)

    def to_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert tensors of any dtype from the model's layout to that of the files; tied ones come once.

        The results may share memory with the arguments.

        Raises:
            InputError: A name is not in the model or not in its files, or only some of the tensors that are
                stored as one are given.
        """
        result: dict[str, Tensor] = {}
        for name in tensors:
            part = self._part(name)
            if not part.slots:
                result.setdefault(part.stored[0], tensors[name])
            elif part.stored[0] not in result:
                result.update(self._split(part, {key: _given(tensors, name, key) for key in part.modules}))
        return result

    def to_module(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert tensors of any dtype from the files' layout to the model's; tied ones under every name.

        Raises:
            InputError: A name is not in the files, or not all parts of a tensor of the model are given.
        """
        result: dict[str, Tensor] = {}
        for name in tensors:
            if name not in self.module_of:
                raise InputError(f"tensor {name!r} does not belong to this model", hint=OTHER_MODEL)
            module = self.module_of[name]
            if module not in result or name in self.duplicates:
                result.update(self._join(self._parts[module], partial(_given, tensors, module)))
        for name in list(result):
            for twin in self.twins(name):
                result.setdefault(twin, result[name])
        return {name: result[name] for name in self._shapes if name in result}

    def load(self, wanted: Collection[str], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors of the model one by one, holding the file tensors of only one of them at a time.

        Args:
            wanted: State-dict names; of tied ones one is read, under the name that its file tensor has.
            read: Returns the tensor of a name in the files.

        Raises:
            InputError: A wanted tensor is not in the files.
        """
        done: set[str] = set()
        for name in wanted:
            part = self._part(self.aliases.get(name, name))
            if part.modules[0] not in done:
                done.add(part.modules[0])
                yield from self._join(part, read).items()

    def expected(self) -> dict[str, Shape]:
        """Return names and shapes of all tensors that the files must hold; of tied ones only one."""
        result: dict[str, Shape] = {}
        missing: set[str] = set()
        optional = self.skeleton._keys_to_ignore_on_load_missing or ()
        for name in self._shapes:
            if name in self.aliases:
                continue
            if name not in self._parts:
                if not any(re.search(pattern, name) for pattern in optional):
                    missing.add(name)
            elif (part := self._parts[name]).slots:
                meta = {key: torch.empty(self._shapes[key], device="meta") for key in part.modules}
                result.update((key, tuple(value.shape)) for key, value in self._split(part, meta).items())
            else:
                result[part.stored[0]] = self._shapes[name]
        if missing:
            canonical = self._canonical()
            located = self._conversion.locate(canonical)
            result |= {key: shape for key, shape in canonical.items() if located[key][0] in missing}
        return result

    def ignored(self, name: str) -> bool:
        """Tell whether the model's class itself passes over a tensor of this name when loading."""
        if name in self.module_of:
            return False
        patterns = list(self.skeleton._keys_to_ignore_on_load_unexpected or ())
        # Buffers that files of older versions hold; the class computes them now.
        buffers = [key for key, _ in self.skeleton.named_buffers()]
        if any(key.endswith("rotary_emb.inv_freq") for key in buffers):
            patterns.append(r"rotary_emb\.inv_freq")
        if any(key.endswith("position_ids") for key in buffers):
            patterns.append(r"(^|\.)position_ids$")
        return any(re.search(pattern, name) for pattern in patterns)

    @property
    def _conversion(self) -> Conversion:
        if self._lazy is None:
            self._lazy = Conversion(self.skeleton, self._shapes)
        return self._lazy

    def _canonical(self) -> dict[str, Shape]:
        unsaved = self.skeleton._keys_to_ignore_on_save or ()
        return self._conversion.canonical(
            {name: s for name, s in self._shapes.items() if name not in self.aliases and name not in unsaved}
        )

    def _find_parts(self, stored: list[str]) -> list[Part]:
        plain = {name: name for name in stored if name in self._shapes}
        rest = [name for name in stored if name not in plain]
        located = self._conversion.locate(stored) if rest else {}
        converted: dict[str, dict[Slot, str]] = {}
        for name in rest:
            if name not in located:
                continue
            module, slot = located[name]
            if slot is not None:
                converted.setdefault(module, {}).setdefault(slot, name)
            else:
                plain.setdefault(module, name)
        parts = [Part((module,), (name,)) for module, name in plain.items()]
        for module, slots in converted.items():
            modules = self._conversion.targets(module, next(iter(slots))[0])
            if not any(name in plain for name in modules):
                order = sorted(slots, key=lambda slot: (slot[1], slot[0]))
                parts.append(Part(modules, tuple(slots[slot] for slot in order), tuple(order)))
        return parts

    def _part(self, name: str) -> Part:
        if name not in self._parts:
            where = "the files" if name in self._shapes else "this model"
            raise InputError(f"tensor {name!r} is not in {where}", hint=OTHER_MODEL)
        return self._parts[name]

    def _join(self, part: Part, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        if not part.slots:
            return {part.modules[0]: read(part.stored[0])}
        return self._conversion.join(part, read)

    def _split(self, part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = dict(zip(part.slots, part.stored, strict=True))
        pieces = self._conversion.split(part.slots[0][0], tensors)
        return {names.get(slot, name): tensor for slot, (name, tensor) in pieces.items()}


def _tied(skeleton: PreTrainedModel) -> dict[str, str]:
    """Return the names of shared parameters, each with the one that it is saved under."""
    names: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    declared = skeleton.all_tied_weights_keys
    aliases: dict[str, str] = {}
    for shared in names.values():
        main = next((name for name in shared if name not in declared), shared[0])
        aliases |= {name: main for name in shared if name != main}
    return aliases


def _given(tensors: Mapping[str, Tensor], whole: str, name: str) -> Tensor:
    if name not in tensors:
        raise InputError(
            f"tensor {whole!r} is incomplete: {name!r} is missing",
            hint="give all tensors of the files that it is made of",
        )
    return tensors[name]
