"""Make text from outside safe to show, and find secrets in texts."""

from __future__ import annotations

import re
from typing import IO
from urllib.parse import urlsplit

#: control characters, line and paragraph separators, marks that change the direction of text, lone surrogates
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
#: scheme://user, and a password up to the last @ before the path
_PASSWORD = re.compile(r"(\b[A-Za-z][\w+.-]*://[^\s/:@]*):[^\s/]*@")


def has_password(url: str) -> bool:
    """Return whether a URL contains a password: ``scheme://user:password@host``."""
    try:
        return bool(urlsplit(url).password)
    except ValueError:
        return False


def without_passwords(text: str) -> str:
    """Return ``text`` with the passwords of all URLs in it replaced by ``***``, for logs and files."""
    return _PASSWORD.sub(r"\1:***@", text)


def printable(text: str, keep: str = "") -> str:
    r"""Return ``text`` with its control characters written as escapes, such as ``\u001b``; those in ``keep`` stay.

    A terminal obeys control characters: they recolour it, move its cursor, hide text or answer as if the user typed.
    The escapes are those of JSON, so that a JSON text stays valid.
    """
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else f"\\u{ord(found[0]):04x}", text)


def show(text: object, *, end: str = "\n", file: IO[str] | None = None, flush: bool = False) -> None:
    """Print as ``print`` does, with control characters as escapes: names and failures come from outside."""
    print(printable(str(text), keep="\n\t"), end=end, file=file, flush=flush)
