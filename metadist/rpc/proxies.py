"""Keep the traffic of this machine with itself away from HTTP proxies."""

from __future__ import annotations

import os
import platform

import psutil

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
LOCAL = ("localhost", "127.0.0.1", "::1")


def bypass_proxies() -> None:
    """Add this machine's names and addresses to ``no_proxy`` where a proxy is set.

    MLflow, gRPC, Ray's clients and fsspec obey the variable; child processes inherit it. Traffic to other machines goes
    where the user's variables send it.
    """
    if not any(os.environ.get(name) or os.environ.get(name.upper()) for name in PROXIES):
        return
    for name in ("no_proxy", "NO_PROXY"):
        listed = [part.strip() for part in (os.environ.get(name) or _other(name)).split(",") if part.strip()]
        if "*" not in listed:
            os.environ[name] = ",".join(dict.fromkeys([*listed, *_mine()]))


def _other(name: str) -> str:
    """Return the value under the other spelling of the variable: programs read one or both of them."""
    return os.environ.get(name.upper() if name.islower() else name.lower()) or ""


def _mine() -> list[str]:
    addresses = [
        each.address.partition("%")[0]
        for each in (address for some in psutil.net_if_addrs().values() for address in some)
        if each.family.name in ("AF_INET", "AF_INET6")
    ]
    return [*LOCAL, platform.node(), *addresses]
