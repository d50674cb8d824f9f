"""From YAML text to typed settings: strict, with messages that name the key, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Literal, Union

import pydantic
import yaml

from metadist.core.errors import ConfigError, MetadistError, nearest

Document = dict[str, Any]


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


def settings(key: str, value: Any, cls: Any) -> Any:
    """A dataclass from a mapping: unknown keys and wrong types are errors, defaults are the dataclass's."""
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ConfigError(
            f"{key}: expected keys and values ({', '.join(f.name for f in fields(cls) if f.init)}), got {value!r}"
        )
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.init}
    for name in value:
        if name not in known:
            raise ConfigError(f"unknown key '{key}.{name}'{nearest(str(name), known)}; allowed: {', '.join(known)}")
    for name, f in known.items():
        if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"key '{key}.{name}' is missing; expected {_type_name(hints[name])}")
    values = {name: typed(f"{key}.{name}", v, hints[name]) for name, v in value.items()}
    with explained(key, cls):
        return cls(**values)


def typed(key: str, value: Any, hint: Any) -> Any:
    """Strictly of the hinted type, except that lists serve as tuples and integers as floats."""
    try:
        return pydantic.TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError as error:
        choices = _choices(hint)
        hint_text = _type_name(hint)
        close = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1) if choices else []
        suggestion = f"; did you mean '{close[0]}'?" if close else ""
        raise ConfigError(f"{key}: {value!r} is not allowed; expected {hint_text}{suggestion}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {value!r} is not a plain value: {error}") from error


def _choices(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [c for part in typing.get_args(hint) for c in _choices(part)]
    return []


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    if hint in names:
        return names[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments)
    if origin is tuple:
        inner = [a for a in arguments if a is not Ellipsis]
        return (
            f"a list of {_type_name(inner[0])}"
            if Ellipsis in arguments
            else f"[{', '.join(_type_name(a) for a in inner)}]"
        )
    return str(hint)


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
