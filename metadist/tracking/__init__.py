"""Experiment tracking: a local spool that is the truth, MLflow filled from it in the background, and plots.

The only importer of mlflow, and that only inside the delivery thread.
"""

from metadist.tracking.base import NullTracker, Tracker
from metadist.tracking.mlflow import MLflowTracker
from metadist.tracking.tracker import log_group, make_tracker, mean_sd, replay, undelivered

__all__ = [
    "MLflowTracker",
    "NullTracker",
    "Tracker",
    "log_group",
    "make_tracker",
    "mean_sd",
    "replay",
    "undelivered",
]
