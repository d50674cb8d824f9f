"""Ports for servers that a test starts later, or whose number it must know before."""

from __future__ import annotations

import random
import socket

#: below those that the kernel gives to every connection (from 32768 on) and above those that Ray gives to its workers
#: (to 19999):
#: nobody takes one between the moment it is chosen and the moment it is bound, but another test that draws the same
#: number
RANGE = range(20_000, 32_768)
_draw = random.SystemRandom()


def free_port() -> int:
    while True:
        port = _draw.choice(RANGE)
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
