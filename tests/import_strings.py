"""A contract of import-linter: modules that strings name (``"metadist.serving.load:build_replica"``) come from a
list.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

from importlinter import Contract, ContractCheck, fields, output

MODULE = re.compile(r"metadist(\.\w+)+(:\w+)?")


class StringsContract(Contract):
    """Forbids string constants that name a module, but for ``allowed`` ones: importer -> module.

    Generated code and the package's own table of public names are exempt.
    """

    allowed = fields.SetField(subfield=fields.StringField(), required=False)

    def check(self, graph, verbose):
        found = {
            f"{module} -> {name}"
            for module in graph.modules
            if module.startswith("metadist.") and not module.endswith("_pb2")
            for name in strings_of(module)
            if name.partition(":")[0] in graph.modules and name != module
        }
        extra = sorted(found - set(self.allowed or ()))
        stale = sorted(set(self.allowed or ()) - found)
        return ContractCheck(kept=not extra and not stale, metadata={"extra": extra, "stale": stale})

    def render_broken_contract(self, check):
        for importer in check.metadata["extra"]:
            output.print_error(f"imported by string, and not allowed: {importer}")
        for importer in check.metadata["stale"]:
            output.print_error(f"allowed, and no longer there: {importer}")


def strings_of(module):
    """The names of modules among the string constants of ``module``, which is read and not imported."""
    top = Path(importlib.util.find_spec("metadist").origin).parent
    path = top.joinpath(*module.split(".")[1:])
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return {
        node.value
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE.fullmatch(node.value)
    }
