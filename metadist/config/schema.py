"""From YAML text to typed settings: strict, with messages that name the key, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar, Union

import pydantic
import yaml

from metadist.core.errors import ConfigError, MetadistError, nearest

Document = dict[str, Any]
"""The keys and values of a config or of a part of one."""

Plain = Union[None, bool, int, float, str, "list[Plain]", "dict[str, Plain]"]
T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (1e-3 is a number), and a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"line {node.start_mark.line + 1}: key '{key}' is given twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
# A date would be the one scalar that JSON, and so the rest of the way, has not: it stays a text.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str) -> Any:
    try:
        value = yaml.load(text, _Loader)
        _check_plain(value, where)
        return value
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except (RecursionError, ValueError) as error:  # an alias within itself; an explicit tag on what is none
        raise ConfigError(f"{where}: not valid YAML: {error}") from error


def _check_plain(value: Any, where: str, key: str = "") -> None:
    if isinstance(value, (dict, list)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            path = f"{key}.{name}" if key else str(name)
            if isinstance(value, dict) and not isinstance(name, str):
                raise ConfigError(f"{where}: key {path} is not a text; write it in quotes")
            _check_plain(item, where, path)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {key}: {value} is not a finite number")
    elif value is not None and not isinstance(value, (str, int, float)):
        raise ConfigError(f"{where}: {key}: {value!r} is not a plain value")


@contextmanager
def explained(key: str, maker: Any) -> Iterator[None]:
    """An error in a user's own constructor names the key that it was called for."""
    try:
        yield
    except MetadistError:
        raise
    except Exception as error:
        what = getattr(maker, "__name__", type(maker).__name__)
        raise ConfigError(f"{key}: {what} raised {type(error).__name__}: {error}") from error


def settings(key: str, value: Any, cls: type[T]) -> T:
    """Build a dataclass from a mapping, strictly: unknown keys, missing keys and wrong types are errors.

    Lists serve as tuples, and whole numbers as floats. Defaults are those of the dataclass.
    """
    value = {} if value is None else value
    known = [f.name for f in _settable(cls)]
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: expected keys and values ({', '.join(known)}), got {value!r}")
    try:
        checked = _model(typing.cast(Any, cls)).validate_json(json.dumps(value))
    except pydantic.ValidationError as error:
        raise _explained_error(key, value, known, error) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {value!r} is not a plain value: {error}") from error
    with explained(key, cls):
        return cls(**{name: getattr(checked, name) for name in value})


def typed(key: str, value: Any, hint: Any) -> Any:
    """Return ``value`` as a ``hint``: a plain type, a dataclass, or a tuple of dataclasses. ConfigError where it is not one."""
    if dataclasses.is_dataclass(hint):
        return settings(key, value, typing.cast(type, hint))
    (item, *_) = typing.get_args(hint) or (None,)
    if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(item):
        if not isinstance(value, list):
            raise ConfigError(f"{key}: expected a list of groups, such as [{{role: learner, max: 2}}], got {value!r}")
        return tuple(settings(f"{key}.{i}", entry, typing.cast(type, item)) for i, entry in enumerate(value or [{}]))
    try:
        return pydantic.TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{key}: {value!r} is not allowed; expected {_expected(error.errors(), 0, value)}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {value!r} is not a plain value: {error}") from error


def _settable(cls: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in fields(cls) if f.init]


@functools.cache
def _model(cls: Any) -> pydantic.TypeAdapter[Any]:
    """Return a strict pydantic model with the fields of a dataclass.

    pydantic takes no configuration for the standard library's dataclasses, and its own would be another class.
    """
    hints = typing.get_type_hints(cls)
    definitions: dict[str, Any] = {}
    for f in _settable(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        definitions[f.name] = (hints[f.name], ... if required else None)
    strict = pydantic.ConfigDict(strict=True, extra="forbid", protected_namespaces=())
    return pydantic.TypeAdapter(pydantic.create_model(cls.__name__, __config__=strict, **definitions))


#: pydantic's error type → the words for the expected value
EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "none_required": "null",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "keys and values",
}


def _explained_error(key: str, value: Document, known: list[str], error: pydantic.ValidationError) -> ConfigError:
    """Translate pydantic's first error and those of the same field."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return ConfigError(f"unknown key '{key}.{name}'{nearest(name, known)}; allowed: {', '.join(known)}")
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return ConfigError(f"key '{key}.{name}' is missing; allowed: {', '.join(known)}")
    same = [e for e in error.errors() if e["loc"][0] == name]
    return ConfigError(f"{key}.{name}: {value[name]!r} is not allowed; expected {_expected(same, 1, value[name])}")


def _expected(errors: list[Any], depth: int, value: Any) -> str:
    """Return the expected values in words, joined over the alternatives of a union, with the nearest spelling."""
    words, choices = [], list[str]()
    for error in errors:
        if error["type"] == "literal_error":
            found = [part.strip("' ") for part in re.split(r", | or ", error["ctx"]["expected"])]
            choices += found
            word = f"one of {', '.join(found)}" if len(found) > 1 else found[0]
        else:
            word = EXPECTED.get(error["type"], error["msg"])
        inside = [part for part in error["loc"][depth:] if isinstance(part, int)]
        words.append(f"{word} at position {inside[0] + 1} of a list" if inside else word)
    return " or ".join(dict.fromkeys(words)) + nearest(str(value), choices)


def flatten(document: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys → dotted keys."""
    if isinstance(document, dict):
        items: Any = document.items()
    elif isinstance(document, list) and any(isinstance(v, (dict, list)) for v in document):
        items = enumerate(document)
    else:
        return {prefix: document}
    return {
        k: v for name, value in items for k, v in flatten(value, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def as_plain(instance: Any) -> Document:
    return json.loads(json.dumps({f.name: getattr(instance, f.name) for f in fields(instance) if f.init}, default=str))
