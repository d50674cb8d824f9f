"""The gradient computations that the inner-loop benchmark compares, one file per library."""
