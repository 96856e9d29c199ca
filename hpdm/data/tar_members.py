"""The members of an uncompressed tar: their names, and where their bytes are. Nothing is unpacked.

The standard library's ``tarfile`` takes a damaged header for the end of the archive, stops at the first end mark of
archives that were joined with ``cat``, and reads headers of any size into memory. Here every byte up to the end of the
file is accounted for. ``tarfile`` parses the single header.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO

MAX_HEADER_BYTES = 2**20
"""Largest header with a long name or with extended attributes."""
_ZEROS = bytes(tarfile.BLOCKSIZE)
_CHUNK = 2**20
_DAMAGED = "not an uncompressed tar, cut off or damaged"
_LONG_NAMES = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_WITHOUT_DATA = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE,
)  # fmt: skip


class TarDamageError(ValueError):
    """A tar that is cut off, damaged, compressed or no tar at all; the message says where, not in which file."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member of a tar."""

    name: str  # without "./" before it
    kind: str  # "file", "hard link", "symbolic link", "folder" or "other"
    offset: int  # of the first byte of its contents in the tar
    size: int  # of its contents, in bytes
    target: str  # of a link, as it is written


_KINDS = {
    **dict.fromkeys((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE), "file"),
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.DIRTYPE: "folder",
}


def read_members(file: IO[bytes]) -> Iterator[TarMember]:
    """Yields the members of a tar, or of several tars one behind the other, in their order.

    Args:
        file: opened for reading, at its start.

    Raises:
        TarDamageError: the file is cut off, damaged, compressed or no tar; a header is larger than 1 MB; a member is
            stored sparse.
    """
    end = os.fstat(file.fileno()).st_size
    offset, place = 0, "at its start"
    for_all: dict[str, str] = {}  # extended attributes of all members that follow, and of the next one
    for_next: dict[str, str] = {}
    ended = False  # an end mark was read, and no header behind it yet
    while block := _block(file, offset):
        if block == _ZEROS[: len(block)] and not for_next:
            # The end of a tar, but perhaps not of the last one.
            offset, ended, for_all = _skip_zeros(file, offset), True, {}
            continue
        header = _parse_header(block, offset, place, ended)
        offset, ended = offset + tarfile.BLOCKSIZE, False
        if header.type not in _LONG_NAMES and header.type not in _EXTENDED:
            member = _member(header, {**for_all, **for_next}, offset, end)
            for_next, place = {}, f"in or after member {member.name!r}"
            offset += _padded(member.size)
            yield member
            continue
        data = _read_extra(file, header, offset, end, place)
        if header.type in _LONG_NAMES:
            for_next[_LONG_NAMES[header.type]] = _decode(data.partition(b"\0")[0])
        else:
            records = for_all if header.type == tarfile.XGLTYPE else for_next
            records |= _parse_records(data, f"{_DAMAGED}, {place}: the header at byte {offset}")
        offset += _padded(header.size)
    if not ended:
        raise TarDamageError(f"{_DAMAGED}, {place}: no header and no end mark at byte {offset}")


def _block(file: IO[bytes], offset: int) -> bytes:
    file.seek(offset)
    return file.read(tarfile.BLOCKSIZE)


def _parse_header(block: bytes, offset: int, place: str, ended: bool) -> tarfile.TarInfo:
    """The header in a block; ``ended`` says that it lies behind an end mark."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        expected = "no member and no zeros behind the end mark" if ended else "no header and no end mark"
        raise TarDamageError(f"{_DAMAGED}, {place}: {expected} at byte {offset} ({error})") from None


def _skip_zeros(file: IO[bytes], offset: int) -> int:
    """The offset of the first block from ``offset`` on that is not all zeros, or of the end of the file."""
    file.seek(offset)
    while chunk := file.read(_CHUNK):
        stripped = len(chunk) - len(chunk.lstrip(b"\0"))
        if stripped < len(chunk):
            return offset + stripped // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        offset += len(chunk)
    return offset


def _read_extra(file: IO[bytes], header: tarfile.TarInfo, offset: int, end: int, place: str) -> bytes:
    """The contents of a header that describes the member behind it."""
    if not 0 <= header.size <= MAX_HEADER_BYTES:
        raise TarDamageError(
            f"{_DAMAGED}, {place}: got a header of {header.size} bytes at byte {offset}, "
            f"expected at most {MAX_HEADER_BYTES}"
        )
    if offset + header.size > end:
        raise TarDamageError(f"cut off, {place}: inside of the header at byte {offset}")
    file.seek(offset)
    return file.read(header.size)


def _member(header: tarfile.TarInfo, records: Mapping[str, str], offset: int, end: int) -> TarMember:
    """The member that a header and the extended attributes before it describe; its contents start at ``offset``."""
    name = records.get("path", header.name)
    if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in records):
        raise TarDamageError(f"member {name!r}: stored sparse, expected a tar that was made without --sparse")
    try:
        size = 0 if header.type in _WITHOUT_DATA else int(records.get("size", header.size))
    except ValueError:
        raise TarDamageError(f"member {name!r}: got size {records['size'][:40]!r}, expected a number") from None
    if size < 0 or offset + size > end:
        raise TarDamageError(
            f"cut off or damaged, in or after member {name!r}: {size} bytes from byte {offset} on, of a file of {end}"
        )
    target = records.get("linkpath", header.linkname)
    return TarMember(name.removeprefix("./"), _KINDS.get(header.type, "other"), offset, size, target)


def _parse_records(data: bytes, place: str) -> dict[str, str]:
    """The records ``length key=value`` of an extended header."""
    records: dict[str, str] = {}
    while data and data.strip(b"\0"):
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if not len(digits) + 2 < length <= len(data) or not equals or data[length - 1 : length] != b"\n":
            raise TarDamageError(f"{place} is damaged: got {data[:20]!r}, expected 'length key=value'")
        records[_decode(key)] = _decode(value)
        data = data[length:]
    return records


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def follow_links(members: Mapping[str, TarMember], name: str) -> TarMember:
    """The file that a member is, or that it leads to over one or more links.

    Args:
        members: by name in normal form, as ``posixpath.normpath`` gives it.
        name: of the member, in normal form.

    Raises:
        TarDamageError: the link leads to nothing in the tar, to something that is no file, or in a circle.
    """
    member, passed = members[name], [name]
    while member.kind in ("hard link", "symbolic link"):
        # A hard link names a member; a symbolic link is relative to the folder that it lies in.
        folder = posixpath.dirname(member.name) if member.kind == "symbolic link" else ""
        target = posixpath.normpath(posixpath.join(folder, member.target))
        if target in passed:
            raise TarDamageError(f"member {name!r}: a {members[name].kind} that leads in a circle")
        if target not in members:
            raise TarDamageError(
                f"member {name!r}: a {members[name].kind} to {member.target!r}, which is not a member of the tar"
            )
        passed.append(target)
        member = members[target]
    if member.kind != "file":
        raise TarDamageError(f"member {name!r}: leads to {member.name!r}, which is no file")
    return member
