"""Runs as Ray jobs, and cluster definitions."""
