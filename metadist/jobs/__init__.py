"""Run a config as a Ray job, and render cluster definitions."""
