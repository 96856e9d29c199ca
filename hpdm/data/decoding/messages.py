"""Messages between a process that wants frames and its decoding process.

A message is an 8-byte length and that many bytes of JSON. A message of status ``frame`` has a ``shape``; the frame,
uint8 ``[H, W, 3]``, lies in the next slot of the shared :class:`~hpdm.data.decoding.ring.Ring`. Whoever takes it writes
one byte in return, and then the slot may be used again.
"""

from __future__ import annotations

import json
import struct
from typing import IO, Any

import numpy as np

from hpdm.data.decoding.ring import Ring

LENGTH = struct.Struct("<Q")
TAKEN = b"."

Message = dict[str, Any]


def send(sink: IO[bytes], message: Message) -> None:
    """Writes one message."""
    body = json.dumps(message).encode()
    sink.write(LENGTH.pack(len(body)) + body)
    sink.flush()


class Port:
    """The decoding process's side.

    Args:
        source: where requests come from, and a byte for each frame that was taken.
        sink: where messages go.
        ring: where frames go.
    """

    def __init__(self, source: IO[bytes], sink: IO[bytes], ring: Ring) -> None:
        self.source, self.sink, self.ring = source, sink, ring
        self.frames = 0  # sent since the last settlement
        self.waiting = 0  # of these, not taken yet

    def receive(self) -> Message | None:
        """Reads a request; ``None`` at the end of the pipe."""
        head = self.source.read(LENGTH.size)
        if len(head) < LENGTH.size:
            return None
        return json.loads(self.source.read(LENGTH.unpack(head)[0]))

    def send(self, message: Message) -> None:
        """Sends a message without a frame."""
        send(self.sink, message)

    def send_frame(self, frame: np.ndarray) -> None:
        """Sends a frame, when there is a place for it; all frames up to a settlement have the same shape."""
        if self.waiting == self.ring.slots(frame.shape):
            self._wait()
        self.ring.slot(self.frames, frame.shape)[...] = frame
        self.frames += 1
        self.waiting += 1
        send(self.sink, {"status": "frame", "shape": frame.shape})

    def settle(self) -> None:
        """Waits until all frames have been taken; the next one goes to the first slot."""
        while self.waiting:
            self._wait()
        self.frames = 0

    def _wait(self) -> None:
        if self.source.read(1) != TAKEN:
            raise EOFError("the process that asked is gone")
        self.waiting -= 1
