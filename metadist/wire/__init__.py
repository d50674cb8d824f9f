"""What crosses a process border: a checked frame around one Arrow IPC stream. Beneath runtime, control and tasks."""

from metadist.wire.codec import (
    RejectedError,
    decode_result,
    decode_theta,
    encode_result,
    encode_theta,
    result_parts,
    theta_parts,
)
from metadist.wire.error_feedback import WIRES, ErrorFeedback
from metadist.wire.frame import FrameError, frame, join, unframe

__all__ = [
    "WIRES",
    "ErrorFeedback",
    "FrameError",
    "RejectedError",
    "decode_result",
    "decode_theta",
    "encode_result",
    "encode_theta",
    "frame",
    "join",
    "result_parts",
    "theta_parts",
    "unframe",
]
