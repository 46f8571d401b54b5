"""From what a user wrote to checked values: a refusal names the key, what was found and expected."""

import inspect
import re
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from structprune.errors import UsageError, nearest
from structprune.recipe.choices import (
    fitting_choices,
    hint_of_choice,
    hint_of_refusal,
    nothing_of,
)
from structprune.recipe.flag_keys import key_of_flag

M = TypeVar("M", bound=BaseModel)


class OptionGroup(BaseModel):
    """A frozen group of keys; unknown keys, a boolean for a number and an empty text are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    @field_validator("*", mode="before")
    @classmethod
    def _not_misread(cls, value: object, info: ValidationInfo) -> object:
        refuse_misread(cls, info.field_name or "", value)
        return value


def refuse_misread(owner: type[BaseModel], name: str, value: object) -> None:
    """Refuse what would silently be read as something else by a field of `owner`.

    True and False for what is not a boolean: Python counts with them as 1 and 0. An empty text: mostly a
    shell's variable that was never set; a path would be the working directory, a pattern would match all.

    Raises:
        ValueError: It is one of these.
    """
    if isinstance(value, str) and not value.strip():
        raise ValueError("found an empty text; leave the key out, or give it a value")
    field = owner.model_fields.get(name)
    if isinstance(value, bool) and field is not None and bool not in _atoms(field.annotation):
        raise ValueError(f"found {str(value).lower()}, expected {_type_text(field.annotation)}")


def build(owner: type[M], raw: object, path: str = "") -> M:
    """Return an instance of `owner` from a mapping of its fields.

    Args:
        owner: Which group of keys it is.
        raw: What was read.
        path: The dotted path of the group, for errors; empty at the top.

    Raises:
        UsageError: An unknown key, a missing one or an impossible value.
    """
    if not isinstance(raw, Mapping):
        raise UsageError(
            f"{path or 'recipe'}: found {quote(raw)}, expected keys with values",
            hint=f"the keys are: {', '.join(owner.model_fields)}",
        )
    try:
        for name, value in raw.items():
            if not issubclass(owner, OptionGroup):  # an OptionGroup refuses by itself
                _refuse_misread_at(owner, name, value, path)
        return owner.model_validate(dict(raw))
    except ValidationError as error:
        details = error.errors(include_url=False)
        # An unknown key explains more than what it leaves missing.
        details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
        raise _usage_error(owner, details[0], path, raw) from None


def put(raw: dict[str, Any], keys: list[str], value: object) -> None:
    """Set `value` in nested mappings, making the groups on the way; `keys` is the path, outermost first.

    Raises:
        UsageError: Something on the way is a value, not a group.
    """
    group: Any = raw
    for index, key in enumerate(keys[:-1]):
        if group.get(key) is None:
            group[key] = {}
        group = group[key]
        if not isinstance(group, dict):
            here = ".".join(keys[: index + 1])
            raise UsageError(
                f"{'.'.join(keys)}: {here} is {quote(group)}, not a group of keys",
                hint=f"remove {here}, or make it a group: {here}: {{{keys[-1]}: ...}}",
            )
    group[keys[-1]] = value


def quote(value: object) -> str:
    """Return a value as an error can quote it: one short line."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to print the longest ones
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "nothing"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def keys_of(owner: type[BaseModel]) -> list[dict[str, Any]]:
    """Return the fields of `owner` as rows: "name", "type", "default" and "about", the docstring's words."""
    about = _about(owner)
    rows = []
    for name, field in owner.model_fields.items():
        default = (
            None if field.is_required() else field.get_default(call_default_factory=True, validated_data={})
        )
        # What a method refuses whatever else it is told is not offered.
        fitting = fitting_choices(owner, name, {})
        rows.append(
            {
                "name": name,
                "type": " | ".join(fitting) if fitting else _type_text(field.annotation),
                "default": nothing_of(field) if default is None else _written(default),
                "about": about.get(name, ""),
            }
        )
    return rows


def _written(value: Any) -> Any:
    """Return a value as a recipe may say it: by its name alone where nothing else of it was chosen."""
    if isinstance(value, BaseModel):
        said = value.model_dump(mode="json", exclude_defaults=True) | {"name": getattr(value, "name", None)}
        whole = value.model_dump(mode="json", exclude_none=True)
        return said["name"] if said["name"] and len(said) == 1 else whole
    return list(value) if isinstance(value, tuple) else value


def _about(owner: type[BaseModel]) -> dict[str, str]:
    """Return what the docstrings of a class and its ancestors say about each field."""
    about: dict[str, str] = {}
    for ancestor in reversed(owner.__mro__):
        about |= _documented(ancestor)
    return about


def _documented(owner: type) -> dict[str, str]:
    """Return what the `Args:` of a class's own docstring say about each name."""
    text = inspect.cleandoc(owner.__dict__.get("__doc__") or "")
    arguments = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    found = re.findall(
        r"^    (\w+): ((?:.+\n?)(?:^        .+\n?)*)", arguments[1] if arguments else "", re.MULTILINE
    )
    return {name: " ".join(words.split()) for name, words in found}


def _refuse_misread_at(owner: type[BaseModel], name: str, value: object, path: str) -> None:
    try:
        refuse_misread(owner, name, value)
    except ValueError as error:
        raise UsageError(
            f"{_join(path, name)}: {error}", hint=f"{name}: {_about(owner).get(name, '')}"
        ) from None


def _usage_error(
    owner: type[BaseModel], detail: ErrorDetails, path: str, raw: Mapping[str, Any]
) -> UsageError:
    keys = [str(part) for part in detail["loc"]]
    here = _join(path, *keys) or "recipe"
    group = _owner_of(owner, keys)
    name = next((key for key in reversed(keys) if not key.isdecimal()), "")  # not the place in a list
    about = _about(group).get(name, "")
    hint = f"{name}: {about}" if about else "`structprune methods NAME` lists a method's fields"
    choices = fitting_choices(group, name, {})
    match detail["type"]:
        case "extra_forbidden":
            instead = key_of_flag(here) or nearest(keys[-1], group.model_fields)
            return UsageError(f"unknown key {here}", hint=instead)
        case "missing":
            return UsageError(f"{here} is missing", hint=hint)
        case "model_type" if _is_model(inner := _inner(group, name)):
            keys_text = ", ".join(inner.model_fields)
            return UsageError(
                f"{here}: found {quote(detail['input'])}, expected keys: {keys_text}", hint=hint
            )
        case "too_short":
            return UsageError(f"{here}: found nothing, expected at least one", hint=hint)
        case "union_tag_invalid" | "union_tag_not_found" | "model_attributes_type" if choices:
            found = detail.get("ctx", {}).get("tag", detail["input"])
            said = f"found {quote(found)}, expected one of: {', '.join(choices)}"
            return UsageError(f"{here}: {said}", hint=hint_of_choice(choices, found) or hint)
        case "value_error":
            said = str(detail["ctx"]["error"])
            instead = hint_of_choice(choices, detail["input"]) if keys else hint_of_refusal(owner, raw, said)
            return UsageError(f"{here}: {said}", hint=instead or hint)
        case _:
            said = (
                detail["msg"].replace("Input should be", "expected").replace("Input should have", "expected")
            )
            return UsageError(
                f"{here}: found {quote(detail['input'])}, {said[0].lower()}{said[1:]}", hint=hint
            )


def _owner_of(owner: type[BaseModel], keys: list[str]) -> type[BaseModel]:
    """Return the class that the last of `keys` belongs to."""
    for key in keys[:-1]:
        field = owner.model_fields.get(key)
        inner = [atom for atom in _atoms(field.annotation if field else None) if _is_model(atom)]
        if not inner:
            break
        # Of a choice between groups pydantic names the one that was chosen as a key of the path.
        owner = next((group for group in inner if _word_for(group) in keys), inner[0])
    return owner


def _inner(owner: type[BaseModel], name: str) -> Any:
    """Return the group of keys that a field is; None where it is none."""
    field = owner.model_fields.get(name)
    return next((atom for atom in _atoms(field.annotation if field else None) if _is_model(atom)), None)


def _word_for(kind: type) -> str:
    """Return what a user writes for a group of keys: its `name` where several are to choose from."""
    named = kind.model_fields.get("name") if issubclass(kind, BaseModel) else None
    return str(named.default) if named is not None else kind.__name__.lower()


def _is_model(atom: object) -> bool:
    return isinstance(atom, type) and issubclass(atom, BaseModel)


def _atoms(annotation: Any) -> list[Any]:
    """Return the plain types that an annotation is made of."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal or not parts:
        return [annotation]
    return [atom for part in parts for atom in _atoms(part)]


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _type_text(annotation: Any) -> str:
    """Return an annotation in a user's words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(part) for part in parts)
    if origin in (Union, types.UnionType):
        return " | ".join(_type_text(part) for part in parts if part is not type(None))
    if origin in (tuple, list):
        return f"list of {_type_text(parts[0])}"
    if origin is dict:
        return f"{_type_text(parts[0])}: {_type_text(parts[1])}"
    if parts:  # Annotated
        return _type_text(parts[0])
    words = {str: "text", int: "integer", float: "number", bool: "true | false"}
    if annotation in words or not isinstance(annotation, type):
        return words.get(annotation, str(annotation).lower())
    return _word_for(annotation)
