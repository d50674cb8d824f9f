"""Oracles and classical methods: what a learned policy is held against, in the same trials."""

from metadist.oracles.compare import ORACLES, Row, compare, methods, play, possible, row, score

__all__ = ["ORACLES", "Row", "compare", "methods", "play", "possible", "row", "score"]
