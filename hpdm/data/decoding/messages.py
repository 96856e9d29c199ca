"""Messages between a process that wants frames and its decoding process.

A message is an 8-byte length and that many bytes of JSON. Where the JSON has a ``shape``, a frame follows, raw uint8
``[H, W, 3]``.
"""

from __future__ import annotations

import json
import struct
from typing import IO, Any

import numpy as np

LENGTH = struct.Struct("<Q")


def receive(source: IO[bytes]) -> dict[str, Any] | None:
    """Reads one message without a frame; ``None`` at the end of the pipe."""
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return json.loads(source.read(LENGTH.unpack(head)[0]))


def send(sink: IO[bytes], message: dict[str, Any], frame: np.ndarray | None = None) -> None:
    """Writes one message."""
    body = json.dumps(message if frame is None else {**message, "shape": frame.shape}).encode()
    sink.write(LENGTH.pack(len(body)) + body)
    if frame is not None:
        sink.write(np.ascontiguousarray(frame).reshape(-1).data)
    sink.flush()
