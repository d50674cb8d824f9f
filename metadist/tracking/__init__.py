"""Record experiments in a local spool, deliver the records to MLflow in the background, and draw plots.

mlflow is imported here alone, and only inside the delivery thread. A package of its own adds a tracker: it derives a
class from ``Tracker`` and declares an entry point in the group ``metadist.trackers`` (``docs/extend.md``).
"""

from metadist.tracking.base import NullTracker, Tracker
from metadist.tracking.mlflow import MLflowTracker
from metadist.tracking.tracker import TRACKER, check_uri, log_group, make_tracker, mean_sd, replay, undelivered

__all__ = [
    "TRACKER",
    "MLflowTracker",
    "NullTracker",
    "Tracker",
    "check_uri",
    "log_group",
    "make_tracker",
    "mean_sd",
    "replay",
    "undelivered",
]
