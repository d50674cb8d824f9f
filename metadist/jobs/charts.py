"""Helm charts rendered without Helm: the part of its template language that our own chart is written in, and no more.

``if``, ``else``, ``range``, ``define``, ``include``, pipelines, and the functions below. What is outside of that part, or a value that
isn't there, is an error. ``deploy/`` tells how the result was compared with Helm's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from metadist.core.errors import ConfigError, MetadistError

_TAG = re.compile(r"(?:\s*\{\{-|\{\{)\s*((?:(?!-?\}\}).)*?)\s*(?:-\}\}\s*|\}\})", re.DOTALL)
_WORD = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\(|\)|\||[^\s()|"]+)')


class TemplateError(MetadistError):
    """The chart is outside of what is understood here."""


@dataclass
class _Block:
    """``text``, ``value``, ``if``, ``range``: what is inside, and behind ``else``."""

    kind: str
    what: str
    body: list[_Block] = field(default_factory=list)
    other: list[_Block] = field(default_factory=list)


@dataclass(frozen=True)
class _Scope:
    dot: Any
    root: Any


class Chart:
    """The templates of a chart's folder and its default values."""

    def __init__(self, folder: Path) -> None:
        self.name = yaml.safe_load((folder / "Chart.yaml").read_text(encoding="utf-8"))["name"]
        self.defaults: dict[str, Any] = yaml.safe_load((folder / "values.yaml").read_text(encoding="utf-8"))
        self._defined: dict[str, list[_Block]] = {}
        self._files: dict[str, list[_Block]] = {}
        for path in sorted((folder / "templates").iterdir()):
            blocks = self._parsed(path.read_text(encoding="utf-8"), path.name)
            if not path.name.startswith("_"):
                self._files[path.name] = blocks

    def render(self, values: Mapping[str, Any], *, release: str, namespace: str) -> dict[str, str]:
        """File → manifest, of those that are not empty. ``values`` go over the defaults; a key that these lack is an error."""
        merged = merge(self.defaults, values)
        root = {"Values": merged, "Release": {"Name": release, "Namespace": namespace}, "Chart": {"Name": self.name}}
        rendered = {name: self._text(blocks, _Scope(root, root)) for name, blocks in self._files.items()}
        return {name: text.strip("\n") + "\n" for name, text in rendered.items() if text.strip()}

    # Reading ----------------------------------------------------------------------------------------------------------

    def _parsed(self, text: str, where: str) -> list[_Block]:
        top = _Block("file", where)
        stack, position, in_else = [top], 0, [False]

        def add(block: _Block) -> None:
            (stack[-1].other if in_else[-1] else stack[-1].body).append(block)

        for tag in _TAG.finditer(text):
            if position < tag.start():
                add(_Block("text", text[position : tag.start()]))
            position = tag.end()
            code = tag[1]
            kind, _, rest = code.partition(" ")
            if code.startswith("/*"):
                continue
            if kind in ("if", "range", "define"):
                block = _Block(kind, rest.strip())
                if kind != "define":
                    add(block)
                stack.append(block)
                in_else.append(False)
            elif code == "else":
                in_else[-1] = True
            elif code == "end":
                if len(stack) == 1:
                    raise TemplateError(f"{where}: an end too many")
                block = stack.pop()
                in_else.pop()
                if block.kind == "define":
                    self._defined[json.loads(block.what)] = block.body
            else:
                add(_Block("value", code))
        if len(stack) > 1:
            raise TemplateError(f"{where}: {stack[-1].kind} {stack[-1].what} has no end")
        return [*top.body, _Block("text", text[position:])]

    # Writing ----------------------------------------------------------------------------------------------------------

    def _text(self, blocks: list[_Block], scope: _Scope) -> str:
        return "".join(self._pieces(blocks, scope))

    def _pieces(self, blocks: list[_Block], scope: _Scope) -> Iterator[str]:
        for block in blocks:
            if block.kind == "text":
                yield block.what
            elif block.kind == "value":
                yield _shown(self._value(block.what, scope))
            elif block.kind == "if":
                yield self._text(block.body if self._value(block.what, scope) else block.other, scope)
            else:
                items = self._value(block.what, scope)
                for item in items or []:
                    yield self._text(block.body, _Scope(item, scope.root))
                if not items:
                    yield self._text(block.other, scope)

    def _value(self, code: str, scope: _Scope) -> Any:
        words = _WORD.findall(code)
        value = self._pipeline(words, scope)
        if words:
            raise TemplateError(f"{{{{ {code} }}}}: '{words[0]}' has no place here")
        return value

    def _pipeline(self, words: list[str], scope: _Scope) -> Any:
        """command | command | …, each taking the one before as its last argument."""
        value: tuple[Any, ...] = ()
        while True:
            arguments: list[Any] = []
            name = words[0] if words and words[0] in self._functions else None
            if name:
                words.pop(0)
            while words and words[0] not in ("|", ")"):
                arguments.append(self._operand(words, scope))
            arguments += value
            if name is None and len(arguments) != 1:
                raise TemplateError(f"expected one value or a function, found {arguments!r}")
            value = (self._functions[name](self, scope, *arguments) if name else arguments[0],)
            if not words or words[0] == ")":
                return value[0]
            words.pop(0)

    def _operand(self, words: list[str], scope: _Scope) -> Any:
        word = words.pop(0)
        if word == "(":
            value = self._pipeline(words, scope)
            words.pop(0)
            return value
        if word.startswith('"'):
            return json.loads(word)
        if re.fullmatch(r"-?\d+", word):
            return int(word)
        if word[0] not in ".$":
            raise TemplateError(f"'{word}' is no function of those understood here: {', '.join(self._functions)}")
        value = scope.root if word[0] == "$" else scope.dot
        for key in filter(None, word.lstrip("$").split(".")):
            if not isinstance(value, Mapping) or key not in value:
                raise TemplateError(f"{word}: there is no '{key}'")
            value = value[key]
        return value

    def _include(self, scope: _Scope, name: str, dot: Any) -> str:
        return self._text(self._defined[name], _Scope(dot, scope.root))

    _functions: Mapping[str, Callable[..., Any]] = {
        "include": _include,
        "toYaml": lambda chart, scope, value: (
            yaml.safe_dump(value, default_flow_style=False).rstrip("\n").removesuffix("\n...")
        ),
        "nindent": lambda chart, scope, width, text: "\n" + "\n".join(" " * width + line for line in text.split("\n")),
        "quote": lambda chart, scope, value: json.dumps(_shown(value), ensure_ascii=False),
        "printf": lambda chart, scope, form, *values: form % values,
        "required": lambda chart, scope, message, value: value if value not in (None, "") else _refuse(message),
        "not": lambda chart, scope, value: not value,
        "and": lambda chart, scope, *values: next((v for v in values if not v), values[-1]),
        "or": lambda chart, scope, *values: next((v for v in values if v), values[-1]),
    }


def merge(defaults: Mapping[str, Any], values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """``values`` over ``defaults``, mapping by mapping; what an empty mapping holds is free."""
    merged = dict(defaults)
    for key, value in values.items():
        path = f"{where}{key}"
        if key not in defaults:
            raise ConfigError(f"chart value '{path}' is unknown; expected one of {', '.join(defaults)}")
        inner = defaults[key]
        merged[key] = (
            merge(inner, value, f"{path}.")
            if isinstance(inner, dict) and inner and isinstance(value, Mapping)
            else value
        )
    return merged


def _shown(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _refuse(message: str) -> Any:
    raise ConfigError(message)
