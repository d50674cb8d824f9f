"""What crosses a process border: a checked frame around one Arrow IPC stream. Beneath runtime, control and tasks."""

from metadist.wire.codec import RejectedError, decode_result, decode_theta, encode_result, encode_theta
from metadist.wire.frame import FrameError, frame, unframe

__all__ = [
    "FrameError",
    "RejectedError",
    "decode_result",
    "decode_theta",
    "encode_result",
    "encode_theta",
    "frame",
    "unframe",
]
