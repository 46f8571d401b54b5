"""Choices between groups of keys that have names, such as repairs and budgets: which there are, which fit."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic.fields import FieldInfo

from structprune.decide.by_name import ByName
from structprune.errors import nearest


def choices_of(field: FieldInfo | None) -> list[str]:
    """Return the names that a field chooses from, the one for no choice last; [] where it has no such."""
    return [] if field is None else list(_choices(field))


def nothing_of(field: FieldInfo) -> str | None:
    """Return what a recipe calls no choice at all; None where there always is one."""
    readers = [one.func for one in field.metadata if isinstance(one, BeforeValidator)]
    return next((one.nothing for one in readers if isinstance(one, ByName)), None)


def fitting_choices(owner: type[BaseModel], name: str, beside: Mapping[str, Any]) -> list[str]:
    """Return which choices `owner` takes of a field.

    Args:
        owner: Which group of keys it is.
        name: The field's.
        beside: The other keys, as they were written.
    """
    field = owner.model_fields.get(name)
    every = {} if field is None else _choices(field)
    return [word for word, value in every.items() if not _refuses(owner, {**beside, name: value})]


def hint_of_choice(choices: Sequence[str], found: object) -> str:
    """Return the name that was meant by one that a field cannot have; "" where none is near."""
    hint = nearest(found, choices) if isinstance(found, str) and found not in choices else ""
    return hint if hint.startswith("did you mean") else ""


def hint_of_refusal(owner: type[BaseModel], raw: Mapping[str, Any], message: str) -> str:
    """Return what to do where one choice does not go with the other keys; "" of another refusal.

    Args:
        owner: Which group of keys it is.
        raw: The keys as they were written.
        message: Why they were refused; it begins with the name of the field.
    """
    found = re.match(r"(\w+): ", message)
    name = found[1] if found else ""
    if not choices_of(owner.model_fields.get(name)):
        return ""
    beside = {key: value for key, value in raw.items() if key != name}
    nothing = nothing_of(owner.model_fields[name])
    fitting = [one for one in fitting_choices(owner, name, beside) if one != nothing]
    said = [f"leave {name} out"] * (not _refuses(owner, beside))
    said += [f"choose {name}: {' or '.join(fitting)}"] * bool(fitting)
    return ", or ".join(said)


def _choices(field: FieldInfo) -> dict[str, object]:
    """Return what a field chooses from by its name: groups of keys, then words; {} where it has no groups."""
    atoms = list(_atoms(field.annotation))
    # Some groups have keys without a default: whether they fit is asked without any.
    groups: dict[str, object] = {
        str(one.model_fields["name"].default): one.model_construct()
        for one in atoms
        if isinstance(one, type) and issubclass(one, BaseModel) and "name" in one.model_fields
    }
    words = {one: one for one in [*atoms, nothing_of(field)] if isinstance(one, str)}
    return groups | words if groups else {}


def _refuses(owner: type[BaseModel], raw: Mapping[str, Any]) -> bool:
    """Tell whether keys are refused together; what is wrong with one of them alone is another matter."""
    try:
        owner.model_validate(dict(raw))
    except ValidationError as error:
        return any(not one["loc"] for one in error.errors(include_url=False))
    return False


def _atoms(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation is made of, and the words of a `Literal`."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal or not parts:
        yield from parts or [annotation]
        return
    for part in parts:
        yield from _atoms(part)
