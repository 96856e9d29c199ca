"""Whether a file has the property that its case is about: a case without it would prove nothing.

Each claim looks at the packets of the file's first video stream, and at nothing that the product says.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import av
from av.video.frame import PictureType

from tests.video.encoding import Chunk, read_chunks
from tests.video.pictures import number_in, shown_number
from tests.video.truth import sequential

Claim = Callable[[Path], bool]


def _times(path: Path) -> list[int | None]:
    return [chunk.pts for chunk in read_chunks(path)[0]]


def nal_units(data: bytes) -> list[bytes]:
    """The units of an H.264 or HEVC packet, behind lengths of four bytes or behind start codes."""
    units, at = [], 0
    while at + 4 <= len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        units.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    if at == len(data) and all(units):
        return units
    return [unit for unit in data.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1") if unit]


def _h264_types(chunk: Chunk) -> set[int]:
    return {unit[0] & 31 for unit in nal_units(chunk.data)}


def _hevc_types(chunk: Chunk) -> set[int]:
    return {unit[0] >> 1 & 63 for unit in nal_units(chunk.data)}


def mpeg4_vops(data: bytes) -> list[tuple[str, bool]]:
    """The pictures in a packet of MPEG-4 part 2: the letter of each, and whether it has content."""
    found, at = [], data.find(b"\0\0\1\xb6")
    while at >= 0:
        found.append(("IPBS"[data[at + 4] >> 6], _vop_coded(data[at + 4 : at + 16])))
        at = data.find(b"\0\0\1\xb6", at + 4)
    return found


def _vop_coded(head: bytes) -> bool:
    bits = "".join(f"{byte:08b}" for byte in head)
    seconds_end = bits.index("0", 2)  # seconds since the last picture: that many ones, then a zero
    return bits[seconds_end + 2 + 5 + 1] == "1"  # two marker bits around the five bits that count 25 ticks


# ---- keyframes ----


def closed(path: Path) -> bool:
    """Every packet of several groups of pictures is shown behind the keyframe in front of it in the file."""
    return not reaches_back(path) and sum(chunk.key for chunk in read_chunks(path)[0]) > 2


def reaches_back(path: Path) -> bool:
    """Open groups of pictures: behind a keyframe in the file lie frames that are shown before it."""
    last_key: int | None = None
    for chunk in read_chunks(path)[0]:
        if chunk.key:
            last_key = chunk.pts
        elif last_key is not None and chunk.pts is not None and chunk.pts < last_key:
            return True
    return False


def keyframes_that_are_no_idr(path: Path) -> bool:
    """H.264 keyframes behind the first that do not end references to what comes before them."""
    return any(chunk.key and 5 not in _h264_types(chunk) for chunk in read_chunks(path)[0][1:])


def one_idr(path: Path) -> bool:
    """H.264 of many frames whose first alone is an IDR picture."""
    chunks = read_chunks(path)[0]
    return len(chunks) > 30 and [5 in _h264_types(chunk) for chunk in chunks] == [True] + [False] * (len(chunks) - 1)


def slices_that_refresh(path: Path) -> bool:
    """H.264 with recovery points at pictures that are not intra: no picture behind the first has an intra slice."""
    chunks = read_chunks(path)[0]
    return one_idr(path) and any(6 in _h264_types(chunk) for chunk in chunks[1:])


def idr_only(path: Path) -> bool:
    """Several H.264 keyframes, each of them an IDR picture."""
    keys = [chunk for chunk in read_chunks(path)[0] if chunk.key]
    return len(keys) > 2 and all(5 in _h264_types(chunk) for chunk in keys)


def clean_random_access(path: Path) -> bool:
    """HEVC keyframes behind the first that are CRA pictures."""
    return any(21 in _hevc_types(chunk) for chunk in read_chunks(path)[0][1:])


def skipped_leading(path: Path) -> bool:
    """HEVC leading pictures that cannot be decoded from the CRA picture in front of them (RASL)."""
    return any(_hevc_types(chunk) & {8, 9} for chunk in read_chunks(path)[0])


def marks_lie(path: Path) -> bool:
    """The container marks another number of frames as keyframes than the intra frames that a decode shows."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        by_packets = sum(packet.is_keyframe for packet in container.demux(stream) if packet.size)
        index = [entry.is_keyframe for entry in stream.index_entries]
    return (sum(index) if index else by_packets) != _intra_frames(path)


def _intra_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(frame.pict_type == PictureType.I for frame in container.decode(video=0))


def no_messages(path: Path) -> bool:
    """H.264 without supplemental messages, among which are recovery points."""
    return not any(6 in _h264_types(chunk) for chunk in read_chunks(path)[0])


def intra_without_idr(path: Path) -> bool:
    """H.264 with more intra frames than IDR pictures."""
    return _intra_frames(path) > sum(5 in _h264_types(chunk) for chunk in read_chunks(path)[0])


def begins_at_cra(path: Path) -> bool:
    """The first HEVC packet is a CRA picture."""
    return 21 in _hevc_types(read_chunks(path)[0][0])


def begins_without_idr(path: Path) -> bool:
    """The first H.264 packet is no IDR picture."""
    return 5 not in _h264_types(read_chunks(path)[0][0])


def one_keyframe(path: Path) -> bool:
    """A keyframe at the start and no other, in a video of many frames."""
    keys = [chunk.key for chunk in read_chunks(path)[0]]
    return len(keys) > 20 and keys[0] and sum(keys) == 1


def all_keyframes(path: Path) -> bool:
    """Every packet is a keyframe."""
    return all(chunk.key for chunk in read_chunks(path)[0])


def starts_inside_a_group(path: Path) -> bool:
    """The first packet of the video is no keyframe; a later one is."""
    keys = [chunk.key for chunk in read_chunks(path)[0]]
    return not keys[0] and any(keys)


def mpeg2_open(path: Path) -> bool:
    """MPEG-2 groups behind the first whose header does not say "closed"."""
    return not all(_mpeg2_groups(path)[1:])


def mpeg2_closed(path: Path) -> bool:
    """Several MPEG-2 groups, each of whose headers says "closed"."""
    groups = _mpeg2_groups(path)
    return len(groups) > 2 and all(groups)


def _mpeg2_groups(path: Path) -> list[bool]:
    data = b"".join(chunk.data for chunk in read_chunks(path)[0])
    found, at = [], data.find(b"\0\0\1\xb8")
    while at >= 0:
        found.append(bool(data[at + 7] & 0x40))
        at = data.find(b"\0\0\1\xb8", at + 4)
    return found


# ---- order and times ----


def reordered(path: Path) -> bool:
    """Frames lie in another order than they are shown in."""
    times = [time for time in _times(path) if time is not None]
    return any(after < before for before, after in pairwise(times))


def in_order(path: Path) -> bool:
    """Frames lie in the order in which they are shown."""
    return not reordered(path)


def repeated_times(path: Path) -> bool:
    """Frames share a time stamp."""
    times = [time for time in _times(path) if time is not None]
    return len(set(times)) < len(times)


def lacks_times(path: Path) -> bool:
    """Some packets have no time stamp, in the file."""
    return any(time is None for time in _times(path))


def uneven_times(path: Path) -> bool:
    """The longest step between frames is more than twice the shortest."""
    times = sorted(time for time in _times(path) if time is not None)
    steps = [after - before for before, after in pairwise(times)]
    return max(steps) > 2 * max(1, min(steps))


def late_start(path: Path) -> bool:
    """The first frame is shown later than at zero."""
    return min(time for time in _times(path) if time is not None) > 0


def early_start(path: Path) -> bool:
    """Frames have negative time stamps."""
    return min(time for time in _times(path) if time is not None) < 0


def times_jump_back(path: Path) -> bool:
    """Time stamps fall by more than a second somewhere."""
    chunks, unit = read_chunks(path)
    times = [chunk.pts for chunk in chunks if chunk.pts is not None]
    return any((before - after) * unit > 1 for before, after in pairwise(times))


# ---- content ----


def two_vops_in_a_packet(path: Path) -> bool:
    """A packet of MPEG-4 part 2 holds two pictures."""
    return any(len(mpeg4_vops(chunk.data)) == 2 for chunk in read_chunks(path)[0])


def empty_vops(path: Path) -> bool:
    """Pictures of MPEG-4 part 2 without content."""
    return any(not coded for chunk in read_chunks(path)[0] for _, coded in mpeg4_vops(chunk.data))


def b_vops(path: Path) -> bool:
    """MPEG-4 part 2 with B-frames, one picture in every packet."""
    vops = [mpeg4_vops(chunk.data) for chunk in read_chunks(path)[0]]
    return any(vop[0][0] == "B" for vop in vops) and all(len(vop) == 1 for vop in vops)


def hidden_vp8(path: Path) -> bool:
    """VP8 packets that are decoded and not shown."""
    return any(not chunk.data[0] >> 4 & 1 for chunk in read_chunks(path)[0])


def hidden_vp9(path: Path) -> bool:
    """VP9 packets that end in an index of several frames, of which one alone is shown."""
    return any(chunk.data[-1] >> 5 == 6 for chunk in read_chunks(path)[0])


def hidden_av1(path: Path) -> bool:
    """AV1 packets of several frames, of which one alone is shown."""
    return any(sum(kind in (3, 6) for kind in _av1_units(chunk.data)) > 1 for chunk in read_chunks(path)[0])


def _av1_units(data: bytes) -> Iterator[int]:
    """The kinds of the units in an AV1 packet: 3 is the header of a frame, 6 a whole one."""
    at = 0
    while at < len(data):
        head, at = data[at], at + 1 + (data[at] >> 2 & 1)
        size = shift = 0
        while True:
            size, byte, at = size | (data[at] & 127) << shift, data[at], at + 1
            shift += 7
            if byte < 128:
                break
        yield head >> 3 & 15
        at += size


def interlaced(path: Path) -> bool:
    """Frames made of two fields."""
    with av.open(str(path)) as container:
        return any(frame.interlaced_frame for frame in container.decode(video=0))


def edited(path: Path) -> bool:
    """An edit list of an mp4 or mov that leaves out frames at the start, or holds more than one piece."""
    data = path.read_bytes()
    at = data.index(b"elst")
    count, _, media_time = struct.unpack(">Iii", data[at + 8 : at + 20])
    return count > 1 or media_time > 0


def sizes_change(path: Path) -> bool:
    """Frames are not all of one size."""
    with av.open(str(path)) as container:
        return len({(frame.width, frame.height) for frame in container.decode(video=0)}) > 1


def several_streams(path: Path) -> bool:
    """More than one video stream."""
    with av.open(str(path)) as container:
        return len(container.streams.video) > 1


def with_matrix(path: Path) -> bool:
    """A display matrix comes with the first frame."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        return any(side_data.type.name == "DISPLAYMATRIX" for side_data in frame.side_data)


def pixels_not_square(path: Path) -> bool:
    """Pixels are wider or narrower than high."""
    with av.open(str(path)) as container:
        return container.streams.video[0].sample_aspect_ratio not in (None, 0, 1)


def as_format(name: str) -> Claim:
    """The claim that the decoded frames are in the pixel format ``name``."""

    def claim(path: Path) -> bool:
        with av.open(str(path)) as container:
            return next(container.decode(video=0)).format.name == name

    claim.__name__ = name
    return claim


def colorless(path: Path) -> bool:
    """The encoder was given no color."""
    with av.open(str(path)) as container:
        image = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
        return bool(abs(image - image.mean(axis=2, keepdims=True)).max() < 3)


def shows(numbers: Sequence[int]) -> Claim:
    """The claim that a decode shows the pictures ``numbers``, read from the pictures themselves."""

    def claim(path: Path) -> bool:
        shown = [number_in(image) for image in sequential(path, upright=False)]
        return shown == [shown_number(number) for number in numbers]

    claim.__name__ = f"shows {', '.join(map(str, numbers))}"
    return claim
