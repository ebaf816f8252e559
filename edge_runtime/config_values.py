"""What a value of a setting must be: from text, as in the environment, or as TOML, flags and profiles give it."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, Final, Literal, Union

__all__ = ["from_text", "from_value"]

_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})


def _options(annotation: Any) -> tuple[list[Any], bool]:
    """The members of a union without ``None``, and whether ``None`` was among them."""
    if typing.get_origin(annotation) not in (Union, types.UnionType):
        return [annotation], False
    members = typing.get_args(annotation)
    return [member for member in members if member is not type(None)], type(None) in members


def from_text(annotation: Any, text: str, folder: Path) -> Any:
    """Reads an environment variable as a type.

    Raises:
        ValueError: It says what the text should have been, to follow "is not".
    """
    (annotation, *_), _ = _options(annotation)
    value: Any = text.strip()
    if annotation is bool:
        if value.lower() not in _TRUE | _FALSE:
            raise ValueError("a truth value (true or false)")
        value = value.lower() in _TRUE
    elif annotation in (int, float):
        try:
            value = annotation(value)
        except ValueError:
            raise ValueError(_noun(annotation)) from None
    elif typing.get_origin(annotation) is tuple:
        element = typing.get_args(annotation)[0]
        return tuple(from_text(element, part, folder) for part in value.split(","))
    elif typing.get_origin(annotation) is Literal:
        value = next((choice for choice in typing.get_args(annotation) if str(choice) == value), value)
    return from_value(annotation, value, folder)


def from_value(annotation: Any, value: Any, folder: Path) -> Any:
    """Checks a value of TOML, of a flag or of a profile against a type.

    Raises:
        ValueError: It says what the value should have been, to follow "is not".
    """
    (annotation, *_), optional = _options(annotation)
    if optional and value is None:
        return None
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        if value not in choices:
            raise ValueError("one of " + ", ".join(map(str, choices)))
        return value
    if typing.get_origin(annotation) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError("a list")
        return tuple(from_value(typing.get_args(annotation)[0], element, folder) for element in value)
    if annotation is Path and isinstance(value, (str, Path)):
        return folder / Path(value).expanduser()
    if annotation is float and type(value) is int:
        return float(value)
    # bool is an int to Python, never to a user.
    if type(value) is not annotation:
        raise ValueError(_noun(annotation))
    return value


def _noun(annotation: Any) -> str:
    nouns = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    return nouns.get(annotation, getattr(annotation, "__name__", str(annotation)))
