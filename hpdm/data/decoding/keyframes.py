"""Which keyframes of H.264 are instantaneous refreshes (IDR), behind which nothing refers to what came before.

ffmpeg also marks other pictures as keyframes: those of open groups of pictures, whose neighbours refer across them, and
recovery points, behind which the picture only mends step by step.
"""

from __future__ import annotations

from collections.abc import Iterator

_IDR = 5  # nal_unit_type of a slice of an IDR picture, ISO/IEC 14496-10, table 7-1


def holds_idr(packet: bytes, extradata: bytes | None) -> bool:
    """Whether a packet of H.264 holds a slice of an IDR picture.

    Args:
        packet: in either form, with lengths (mp4) or with start codes.
        extradata: of the stream; it tells the form.
    """
    with_lengths = extradata is not None and len(extradata) > 4 and extradata[0] == 1
    units = _by_length(packet, (extradata[4] & 3) + 1) if with_lengths and extradata else _by_start_code(packet)
    return any(first & 31 == _IDR for first in units)


def _by_length(packet: bytes, width: int) -> Iterator[int]:
    """The first byte of each unit of a packet whose units stand behind their lengths of ``width`` bytes."""
    at = 0
    while at + width < len(packet):
        size = int.from_bytes(packet[at : at + width], "big")
        yield packet[at + width]
        at += width + size


def _by_start_code(packet: bytes) -> Iterator[int]:
    """The first byte of each unit of a packet whose units stand behind the bytes 0 0 1."""
    at = packet.find(b"\0\0\1")
    while 0 <= at < len(packet) - 3:
        yield packet[at + 3]
        at = packet.find(b"\0\0\1", at + 3)
