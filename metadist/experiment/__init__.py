"""Run experiments: train, evaluate, verify, and record the results."""
