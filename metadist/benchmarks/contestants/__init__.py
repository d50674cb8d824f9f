"""Gradient computations for the inner-loop benchmark: metadist's own, and those of other libraries."""
