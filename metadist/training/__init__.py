"""The outer loop, its scheduler and its evaluation."""
