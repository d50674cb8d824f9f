"""Write the reference of every key of a config, from the dataclasses that read it (docs/config.md)."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator, Mapping

from metadist.config.catalog import ALGORITHM, ENVIRONMENT, MODEL, TASK_FAMILY
from metadist.config.experiment import COMPONENTS, KEYS, setting_types
from metadist.config.plugins import Kind
from metadist.config.schema import in_words, mappings_of, plain_default

HEAD = """# Every key of a config

`metadist list keys > docs/config.md` writes this page from the dataclasses that read a config. Overrides have the same
names: `metadist train CONFIG outer.lr=1e-3`; lists are indexed: `workers.0.cpus=2`. `metadist train CONFIG
--print-config` prints a config with every default.
"""
#: key of a component → heading, and the components by name
KINDS: Mapping[str, Kind[type]] = {
    "tasks": TASK_FAMILY,
    "environment": ENVIRONMENT,
    "model": MODEL,
    "algorithm": ALGORITHM,
}


def reference() -> str:
    """Return the page, in Markdown."""
    return "\n".join([HEAD, *_settings(), *_components()]).rstrip() + "\n"


def _settings() -> Iterator[str]:
    defaults = {f.name: f for f in KEYS if f.name not in COMPONENTS}
    sections = {name: _section_of(hint) for name, hint in setting_types().items()}
    yield "## Single values\n"
    yield from _table((name, setting_types()[name], f) for name, f in defaults.items() if sections[name] is None)
    for name, section in sections.items():
        if section is not None:
            several = typing.get_origin(setting_types()[name]) is tuple
            yield f"## `{name}`" + (": a list of groups" if several else "") + "\n"
            yield from _described(section)
            for key, item in mappings_of(section).items():
                yield f"### `{name}.{key}`: by name\n"
                yield from _described(item)


def _components() -> Iterator[str]:
    for key, kind in KINDS.items():
        yield f"## `{key}`\n"
        yield f"`{key}.name` is one of the following, the name of a plug-in, or `package.module:name` of your own."
        more = (
            " `model.freeze`: a list of names of parameters that stay fixed (patterns are allowed). `model.output`: "
            "the field, or the place in a tuple, of the prediction in what `forward` returns; by default a tensor "
            "itself, the `logits` of an object, or a tuple or dict of tensors whole, for a loss that takes it."
        )
        yield (more.strip() if key == "model" else "") + "\n"
        for name, cls in sorted(kind.own.items()):
            yield f"### `{key}: {{name: {name}}}`\n"
            yield from _described(cls)


def _section_of(hint: object) -> type | None:
    (item, *_) = typing.get_args(hint) or (None,)
    found = item if typing.get_origin(hint) is tuple else hint
    return found if inspect.isclass(found) and dataclasses.is_dataclass(found) else None


def _described(cls: type) -> Iterator[str]:
    yield inspect.cleandoc(cls.__doc__ or "").replace("``", "`") + "\n"
    hints = typing.get_type_hints(cls)
    settable = [f for f in dataclasses.fields(cls) if f.init] if dataclasses.is_dataclass(cls) else []
    if settable:
        yield from _table((f.name, hints[f.name], f) for f in settable)


def _table(rows: typing.Iterable[tuple[str, object, dataclasses.Field[typing.Any]]]) -> Iterator[str]:
    yield "| key | values | default |\n|---|---|---|"
    for name, hint, field in rows:
        words = in_words(hint).replace("|", "\\|")
        yield f"| `{name}` | {words} | {plain_default(field)} |"
    yield ""
