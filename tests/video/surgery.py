"""Changes to encoded video that no encoder makes: packed B-frames, cuts, damage, foreign headers."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from tests.video.encoding import Chunk

VOP = b"\0\0\1\xb6"
PACKED_MARK = b"\0\0\1\xb2DivX503b1393p"
"""User data by which DivX and XviD say that a stream has packed B-frames."""
TS_PACKET = 188


def vop_kind(data: bytes) -> str:
    """The letter of the first picture in a packet of MPEG-4 part 2."""
    return "IPBS"[data[data.index(VOP) + 4] >> 6]


def empty_vop(like: bytes) -> bytes:
    """A P-VOP without content, at the time of the picture ``like`` (of a stream with 25 ticks a second)."""
    at = like.index(VOP) + 4
    bits = "".join(f"{byte:08b}" for byte in like[at : at + 12])
    time_end = bits.index("0", 2) + 2 + 5 + 1  # seconds in ones and a zero, a marker, five bits of ticks, a marker
    head = "01" + bits[2:time_end] + "0"  # P, the time, "not coded"
    head += "0" + "1" * (7 - len(head) % 8)
    return VOP + bytes(int(head[at : at + 8], 2) for at in range(0, len(head), 8))


def pack_b_frames(chunks: list[Chunk], mark: bool = True, empty: bool = True) -> list[Chunk]:
    """MPEG-4 part 2 as DivX and XviD pack it into AVI, in which every packet must show one frame.

    A reference frame shares its packet with the first B-frame behind it; where the packet of the last B-frame of the
    row would be, an empty picture stands. So the decoder has one frame to show per packet from the start.

    Args:
        chunks: packets in the order of decoding, one picture each.
        mark: says in the stream that it is packed.
        empty: puts the empty pictures in; without them the file has fewer packets than frames.
    """
    data, packed, at = [chunk.data for chunk in chunks], [], 0
    while at < len(data):
        reference, key = data[at], vop_kind(data[at]) == "I"
        content = reference
        if mark and key:
            content = reference.replace(VOP, PACKED_MARK + VOP, 1)
        at += 1
        if at == len(data) or vop_kind(data[at]) != "B":
            packed.append((content, key))
            continue
        packed.append((content + data[at], key))
        at += 1
        while at < len(data) and vop_kind(data[at]) == "B":
            packed.append((data[at], False))
            at += 1
        if empty:
            packed.append((empty_vop(reference), False))
    return [Chunk(content, number, number, key) for number, (content, key) in enumerate(packed)]


def empty_chunks(path: Path, filler: bytes) -> None:
    """Empties the chunks of an AVI that hold ``filler``: their sizes become zero, and what is left becomes junk."""
    data = bytearray(path.read_bytes())
    chunk = b"00dc" + struct.pack("<I", len(filler)) + filler
    index = data.rindex(b"idx1")
    start = data.index(b"movi")
    at, found = data.find(chunk), 0
    while at >= 0:
        data[at + 4 : at + 8] = bytes(4)
        data[at + 8 : at + 16] = b"JUNK" + struct.pack("<I", len(filler) - 8)
        entry = data.index(struct.pack("<II", at - start, len(filler)), index)
        data[entry + 4 : entry + 8] = bytes(4)
        at, found = data.find(chunk, at + 1), found + 1
    if not found:
        raise ValueError(f"{path}: no chunk holds the filler")
    path.write_bytes(data)


def cut(source: Path, path: Path, first: float, last: float = 1.0, unit: int = TS_PACKET) -> None:
    """Copies the part of a file between two shares of its length, cut at multiples of ``unit`` bytes."""
    data = source.read_bytes()
    start, end = (round(share * len(data)) // unit * unit for share in (first, last))
    path.write_bytes(data[start:end])


def damage(chunks: list[Chunk], number: int, change: Callable[[bytes], bytes]) -> list[Chunk]:
    """The packets with the content of one of them changed."""
    chunk = chunks[number]
    changed = Chunk(change(chunk.data), chunk.pts, chunk.dts, chunk.key)
    return [*chunks[:number], changed, *chunks[number + 1 :]]


def flipped(data: bytes) -> bytes:
    """Some bytes in the second half of a packet turned over: its headers stay, its content is wrong."""
    changed = bytearray(data)
    for at in range(len(data) // 2, len(data), max(1, len(data) // 16)):
        changed[at] ^= 0x5A
    return bytes(changed)


def zeroed(data: bytes) -> bytes:
    """The second half of a packet filled with zeros."""
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def shortened(data: bytes) -> bytes:
    """The first third of a packet."""
    return data[: max(1, len(data) // 3)]


def set_edit_list(path: Path, edits: list[tuple[int, int]]) -> None:
    """Replaces the edit list of an mp4's first track, behind which the index must come last in the file.

    Args:
        path: an mp4 whose ``moov`` box is the last, and which has an edit list.
        edits: of each piece the duration in units of the movie, and in units of the track the time from the first
            frame on at which it starts, -1 for a pause.
    """
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") - 4
    (old_size,) = struct.unpack(">I", data[at : at + 4])
    (first,) = struct.unpack(">i", data[at + 20 : at + 24])  # where the one piece of the old list starts
    entries = [(duration, start if start < 0 else first + start, 1 << 16) for duration, start in edits]
    table = b"".join(struct.pack(">Iii", *entry) for entry in entries)
    body = b"elst" + struct.pack(">II", 0, len(edits)) + table
    box = struct.pack(">I", len(body) + 4) + body
    data[at : at + old_size] = box
    for name in (b"edts", b"trak", b"moov"):
        start = data.index(name) - 4
        (size,) = struct.unpack(">I", data[start : start + 4])
        data[start : start + 4] = struct.pack(">I", size + len(box) - old_size)
    path.write_bytes(data)
