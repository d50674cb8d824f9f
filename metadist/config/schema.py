"""From YAML text to typed settings: strict, with messages that name the key, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar, Union

import pydantic
import yaml
from typing_extensions import NotRequired, TypedDict

from metadist.core.errors import ConfigError, MetadistError, nearest

Document = dict[str, Any]
"""The keys and values of a config or of a part of one."""

Plain = Union[None, bool, int, float, str, "list[Plain]", "dict[str, Plain]"]
T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """Reads floats as YAML 1.2 does (1e-3 is a number), and refuses a key that is given twice."""

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
# A date is the one scalar that JSON does not have: it stays a text.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str) -> object:
    """Parse YAML 1.2 strictly. ConfigError names ``where``, the line and the key."""
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


def parse_document(text: str, where: str) -> Document:
    """Parse the YAML of a whole config. ConfigError where it is no mapping."""
    document = parse_yaml(text, where)
    if not isinstance(document, dict):
        raise ConfigError(f"{where}: expected keys and values, found {type(document).__name__}")
    return document


def _check_plain(value: object, where: str, key: str = "") -> None:
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
def explained(key: str, maker: object) -> Iterator[None]:
    """Turn an error of a user's own constructor into a ConfigError that names the key."""
    try:
        yield
    except MetadistError:
        raise
    except Exception as error:
        what = getattr(maker, "__name__", type(maker).__name__)
        raise ConfigError(f"{key}: {what} raised {type(error).__name__}: {error}") from error


def settings(key: str, value: object, cls: type[T]) -> T:
    """Build a dataclass from a mapping, strictly: unknown keys, missing keys and wrong types are errors.

    Lists serve as tuples, and whole numbers as floats. Defaults are those of the dataclass.
    """
    value = {} if value is None else value
    known = [f.name for f in _settable(cls)]
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: expected keys and values ({', '.join(known)}), got {value!r}")
    sections: Document = {
        n: _sections(f"{key}.{n}", value[n], item) for n, item in mappings_of(cls).items() if n in value
    }
    try:
        checked = _validator(typing.cast(Any, cls)).validate_json(json.dumps({**value, **dict.fromkeys(sections, {})}))
    except pydantic.ValidationError as error:
        raise _explained_error(key, value, cls, error) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {value!r} is not a plain value: {error}") from error
    with explained(key, cls):
        return cls(**{**checked, **sections})


def mappings_of(cls: Any) -> dict[str, type]:
    """Return the fields of a dataclass that map names to dataclasses: field → the dataclass."""
    hints = {n: (typing.get_origin(hint), typing.get_args(hint)) for n, hint in typing.get_type_hints(cls).items()}
    found = {n: typing.cast(type, args[1]) for n, (origin, args) in hints.items() if origin is Mapping}
    return {n: item for n, item in found.items() if dataclasses.is_dataclass(item)}


def _sections(key: str, value: object, cls: type[T]) -> dict[str, T]:
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: expected keys and values, the names of sections, got {value!r}")
    return {name: settings(f"{key}.{name}", section, cls) for name, section in value.items()}


def typed(key: str, value: object, hint: object) -> object:
    """Return ``value`` as a ``hint``: a plain type, a dataclass, or a tuple of dataclasses.

    ConfigError where it is not one.
    """
    if dataclasses.is_dataclass(hint):
        return settings(key, value, typing.cast(type, hint))
    (item, *_) = typing.get_args(hint) or (None,)
    if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(item):
        if not isinstance(value, list):
            raise ConfigError(f"{key}: expected a list of groups, such as [{{role: learner, max: 2}}], got {value!r}")
        return tuple(settings(f"{key}.{i}", entry, typing.cast(type, item)) for i, entry in enumerate(value or [{}]))
    try:
        return pydantic.TypeAdapter(typing.cast(Any, hint)).validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{key}: {value!r} is not allowed; expected {_expected(hint, value)}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {value!r} is not a plain value: {error}") from error


def _settable(cls: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in fields(cls) if f.init]


@functools.cache
def _validator(cls: Any) -> pydantic.TypeAdapter[Any]:
    """Return a validator of mappings with the fields of a dataclass: strict, extra keys forbidden.

    pydantic takes no configuration for the standard library's dataclasses, and its own would be another class.
    """
    hints = typing.get_type_hints(cls)
    definitions: dict[str, Any] = {}
    for f in _settable(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        hint = dict[str, Any] if f.name in mappings_of(cls) else hints[f.name]
        definitions[f.name] = hint if required else NotRequired[hint]
    mapping = typing.cast(Any, TypedDict)(cls.__name__, definitions)
    strict = pydantic.ConfigDict(strict=True, extra="forbid")
    return pydantic.TypeAdapter(pydantic.with_config(strict)(mapping))


#: type in a JSON schema → words
WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "boolean": "true or false",
    "null": "null",
    "object": "keys and values",
    "array": "a list",
}


def _explained_error(key: str, value: Document, cls: Any, error: pydantic.ValidationError) -> ConfigError:
    """Translate pydantic's first error."""
    known = [f.name for f in _settable(cls)]
    first = error.errors()[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return ConfigError(f"unknown key '{key}.{name}'{nearest(name, known)}; allowed: {', '.join(known)}")
    expected = _expected(typing.get_type_hints(cls)[name], value.get(name))
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return ConfigError(f"key '{key}.{name}' is missing; expected {expected}")
    return ConfigError(f"{key}.{name}: {value[name]!r} is not allowed; expected {expected}")


def _expected(hint: Any, value: Any) -> str:
    """Describe the values of a type, from its JSON schema, and the allowed spelling that is nearest to ``value``."""
    schema = pydantic.TypeAdapter(hint).json_schema()
    return _words(schema) + nearest(str(value), _choices(schema))


def _words(schema: Document) -> str:
    if "anyOf" in schema:
        return " or ".join(_words(alternative) for alternative in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "const" in schema:
        return str(schema["const"])
    if "prefixItems" in schema:
        return f"[{', '.join(_words(item) for item in schema['prefixItems'])}]"
    if "additionalProperties" in schema and "$defs" in schema:
        return "keys and values, by name"
    if "items" in schema:
        return f"a list of {_words(schema['items'])}"
    return WORDS.get(schema.get("type", ""), "another value")


def _choices(schema: Document) -> list[str]:
    alternatives = [choice for part in schema.get("anyOf", ()) for choice in _choices(part)]
    return [*map(str, schema.get("enum", ())), *alternatives]


def in_words(hint: object) -> str:
    """Describe the values of a type for a reader."""
    return _words(pydantic.TypeAdapter(typing.cast(Any, hint)).json_schema())


def plain_default(field: dataclasses.Field[Any]) -> str:
    """Return the default of a field as Markdown: as a config writes it, or ``required``."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default if field.default is not dataclasses.MISSING else typing.cast(Any, field.default_factory)()
    return f"`{json.dumps(value, default=str)}`"


def flatten(document: object, prefix: str = "") -> dict[str, object]:
    """Turn nested keys into dotted ones. Lists of plain values stay values."""
    if isinstance(document, dict):
        items: Any = document.items()
    elif isinstance(document, list) and any(isinstance(v, (dict, list)) for v in document):
        items = enumerate(document)
    else:
        return {prefix: document}
    return {
        k: v for name, value in items for k, v in flatten(value, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def as_plain(instance: object) -> Document:
    """Return the fields of a dataclass as plain data."""
    values = {f.name: getattr(instance, f.name) for f in _settable(instance)}
    return typing.cast(Document, json.loads(json.dumps(values, default=_as_json)))


def _as_json(value: object) -> object:
    return as_plain(value) if dataclasses.is_dataclass(value) else str(value)
