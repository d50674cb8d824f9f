"""Compare learned policies with oracles and classical methods, in the same trials."""

from metadist.oracles.compare import ORACLES, Row, compare, methods, play, possible, row, score

__all__ = ["ORACLES", "Row", "compare", "methods", "play", "possible", "row", "score"]
