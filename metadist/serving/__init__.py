"""Adaptation as a service."""
