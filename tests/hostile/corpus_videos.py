"""Hostile videos and folders of them: lists of other files, claims, bombs, names and things that are no files."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import av

from tests.hostile.corpus import Case, Good
from tests.tar_files import pack


def cases() -> list[Case]:
    """All of them; a clip that cannot be read is reported, and is no error."""
    return [*content_cases(), *bomb_cases(), *folder_cases()]


def _inspect(path: Path) -> list[object]:
    return ["data", "inspect", path, "--timeout", "20"]


def content_cases() -> list[Case]:
    """A file whose contents are something else than its name says."""
    other = "good.bin"  # lies beside it, is a video, and must not be opened
    contents: dict[str, Callable[[bytes], bytes]] = {
        "ffconcat": lambda v: f"ffconcat version 1.0\nfile {other}\n".encode(),
        "ffconcat of /etc/passwd": lambda v: b"ffconcat version 1.0\nfile /etc/passwd\n",
        "HLS": lambda v: f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{other}\n#EXT-X-ENDLIST\n".encode(),
        "HLS of an address": lambda v: b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n",
        "SDP": lambda v: b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "DASH": lambda v: b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>',
        "a text": lambda v: b"hello\n" * 300,
        "a shell script": lambda v: b"#!/bin/sh\ntouch PWNED\n",
        "zeros": lambda v: bytes(9999),
        "noise": lambda v: bytes((i * 7919) % 251 for i in range(9999)),
        "one byte": lambda v: b"x",
        "the first half": lambda v: v[: len(v) // 2],
        "the second half": lambda v: v[len(v) // 2 :],
        "2^31 frames in stts": lambda v: _patched(v, b"stts", 12, 0x7FFFFFFF),
        "2^28 frames in stsz": lambda v: _patched(v, b"stsz", 12, 0x0FFFFFFF),
        "2^31 samples of one size": lambda v: _patched(v, b"stsz", 8, 1),
        "a box of 2^31 bytes": lambda v: struct.pack(">I", 0x7FFFFFFF) + v[4:],
        "an svg": lambda v: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "lavfi": lambda v: b"testsrc=size=64x64:duration=9",
    }

    def folder_with(suffix: str, change: Callable[[bytes], bytes]) -> Callable[[Path, Good], Sequence[object]]:
        def make(folder: Path, good: Good) -> Sequence[object]:
            (folder / f"a{suffix}").write_bytes(change(good.video))
            (folder / other).write_bytes(good.video)
            return _inspect(folder)

        return make

    def in_tar(change: Callable[[bytes], bytes]) -> Callable[[Path, Good], Sequence[object]]:
        def make(folder: Path, good: Good) -> Sequence[object]:
            (folder / other).write_bytes(good.video)
            return _inspect(pack(folder / "s.tar", ("a.mp4", change(good.video))))

        return make

    lists = ("ffconcat", "HLS", "SDP", "DASH")
    read = ("2^31 frames in stts",)  # the frames that are there are found
    found = [
        Case(f"video: {name}", folder_with(".mp4", change), status=int(name not in read), line=False)
        for name, change in contents.items()
    ]
    found += [Case(f"video in a tar: {name}", in_tar(contents[name]), line=False) for name in lists]
    found += [Case(f"video .ts: {name}", folder_with(".ts", contents[name]), line=False) for name in lists]
    found += [
        Case(f"image: {name}", folder_with(".png", contents[name]), line=False)
        for name in ("ffconcat", "an svg", "a text", "lavfi", "noise")
    ]
    return found


def bomb_cases() -> list[Case]:
    """Small files with frames of enormous size."""

    def encoded(name: str, codec: str, size: int, pixels: str) -> Callable[[Path, Good], Sequence[object]]:
        def make(folder: Path, _: Good) -> Sequence[object]:
            with av.open(str(folder / name), "w") as container:
                stream = container.add_stream(codec, rate=30)
                stream.width = stream.height = size
                stream.pix_fmt = pixels
                frame = av.VideoFrame(size, size, pixels)
                for plane in frame.planes:
                    plane.update(bytes(plane.buffer_size))
                container.mux(stream.encode(frame))
                container.mux(stream.encode(None))
            return _inspect(folder)

        return make

    return [
        Case("bomb: mpeg4 of 7000x7000", encoded("a.mp4", "mpeg4", 7000, "yuv420p"), line=False),
        Case("bomb: ffv1 of 12000x12000", encoded("a.mkv", "ffv1", 12000, "gray"), line=False),
        Case("bomb: png of 9000x9000", encoded("a.png", "png", 9000, "gray"), line=False),
    ]


def folder_cases() -> list[Case]:
    """Folders with links, pipes and names that a terminal obeys."""

    def links(folder: Path, good: Good) -> Sequence[object]:
        root = folder / "set" / "c"
        root.mkdir(parents=True)
        (root / "a.mp4").write_bytes(good.video)
        for name, target in {
            "loop": "..",
            "null.mp4": "/dev/zero",
            "dangling.mp4": "no",
            "passwd.mp4": "/etc/passwd",
        }.items():
            (root / name).symlink_to(target)
        os.mkfifo(root / "pipe.mp4")
        (root / "folder.mp4").mkdir()
        return _inspect(folder / "set")

    def names(folder: Path, good: Good) -> Sequence[object]:
        root = folder / "set"
        root.mkdir()
        for name in (
            b"inv\xff\xfe.mp4",
            b"new\nline.mp4",
            b"\x1b]0;PWNED\x07.mp4",
            b"\xc2\x9b31m.mp4",
            b"%d%s.mp4",
            b"-rf.mp4",
        ):
            with open(os.fsencode(root) + b"/" + name, "wb") as file:
                file.write(good.video)
        return _inspect(root)

    def damaged(folder: Path, good: Good) -> Sequence[object]:
        root = folder / "set"
        root.mkdir()
        with open(os.fsencode(root) + b"/\x1b]0;PWNED\x07\n.mp4", "wb") as file:
            file.write(b"no video")
        return _inspect(root)

    def class_folder(folder: Path, good: Good, name: bytes) -> Sequence[object]:
        place = os.fsencode(folder / "set") + b"/" + name
        os.makedirs(place)
        with open(place + b"/a.mp4", "wb") as file:
            file.write(good.video)
        return _inspect(folder / "set")

    def pipe(folder: Path, _: Good) -> Sequence[object]:
        os.mkfifo(folder / "a.mp4")
        return _inspect(folder / "a.mp4")

    def deep(folder: Path, good: Good) -> Sequence[object]:
        place = folder.joinpath("set", *["d"] * 300)
        os.makedirs(place)
        (place / "a.mp4").write_bytes(good.video)
        return _inspect(folder / "set")

    return [
        Case("folder: links, pipes, folders", links, line=False),
        Case("folder: names", names, 0, line=False),
        Case("folder: a damaged clip with escapes in its name", damaged, line=False),
        Case("folder: a class with escapes", lambda f, good: class_folder(f, good, b"\x1b]0;PWNED\x07")),
        Case("folder: a class that is not UTF-8", lambda f, good: class_folder(f, good, b"a\xff")),
        Case("folder: a class with a line break", lambda f, good: class_folder(f, good, b"a\nb")),
        Case("folder: a pipe itself", pipe),
        Case("folder: 300 deep", deep),
    ]


def _patched(video: bytes, box: bytes, offset: int, value: int) -> bytes:
    """A video with a 32-bit number of one of its boxes replaced."""
    place = video.index(box) + offset
    return video[:place] + struct.pack(">I", value) + video[place + 4 :]
