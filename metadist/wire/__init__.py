"""The format of data that crosses a process border: a checked frame around one Arrow IPC stream."""

from metadist.wire.codec import (
    RejectedError,
    ResultHeader,
    ThetaHeader,
    decode_result,
    decode_theta,
    result_parts,
    theta_parts,
)
from metadist.wire.error_feedback import WIRES, ErrorFeedback
from metadist.wire.frame import FrameError, join, unframe

__all__ = [
    "WIRES",
    "ErrorFeedback",
    "FrameError",
    "RejectedError",
    "ResultHeader",
    "ThetaHeader",
    "decode_result",
    "decode_theta",
    "join",
    "result_parts",
    "theta_parts",
    "unframe",
]
