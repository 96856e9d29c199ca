"""One writer per folder: a lock that a process holds while it writes there, and that dies with the process.

The lock is a POSIX record lock on ``FOLDER/.lock``. The system releases it when the process ends, however that happens,
and processes that it has forked do not hold it. Network file systems with a lock service share it between machines.
While a process holds it, it must not open that file again: closing it would release the lock.

Where the file system has no locks, the process makes ``FOLDER/.lock.owner``, which fails if it is there, and touches it
every few seconds. The lock of a process that is gone is then recognized: on the same machine because no such process
runs, on another one because the file is no longer touched.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from datetime import datetime
from fcntl import LOCK_EX, LOCK_NB, lockf
from pathlib import Path
from typing import Any

from hpdm.files import decode_text
from hpdm.json_file import parse_json

NAME = ".lock"
HEARTBEAT = 10.0
"""Seconds between touches of the file, where the file system has no locks."""
STALE = 60.0
"""Age in seconds from which the file of another machine counts as left behind."""
TAKEOVER = 0.2
"""Seconds in which another process that saw the same stale file may still act on it."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
"""Errors of a file system that has no locks."""
_LIMIT = 4096  # bytes of a lock's contents

# Record locks do not tell the threads of a process apart, and closing a file in any thread releases them.
_held: set[Path] = set()
_held_guard = threading.Lock()


class LockedError(RuntimeError):
    """Another process, or another thread of this one, writes into the folder."""


class FolderLock:
    """Holds a folder for writing, within the block. The folder is made if it is missing, and removed if it stays empty.

    Args:
        folder: what is locked. It may hold locks of several names.
        argument: the option that named the folder, for messages.
        work: what the holder does, for the message that others get: ``"hpdm train"``.
        name: of the lock's file.
        subject: what is locked, for messages; the folder if not given.

    Raises:
        LockedError: on entering, somebody else holds it; at once.
        OSError: the folder is not writable.
    """

    def __init__(self, folder: Path, argument: str, work: str, name: str = NAME, subject: str | None = None) -> None:
        self.folder, self.argument, self.subject = folder, argument, subject or str(folder)
        self.path = folder / name
        self._owner = folder / f"{name}.owner"  # where the file system has no locks
        self._about: dict[str, Any] = {
            "work": work, "host": socket.gethostname(), "pid": os.getpid(), "started": start_of_process(os.getpid()),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"), "token": secrets.token_hex(8),
        }  # fmt: skip
        self._file = -1
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> FolderLock:
        self._made_folder = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._key = self.path.resolve()
        with _held_guard:
            if self._key in _held:
                raise LockedError(f"{self.argument}: {self.subject} is in use by another thread of this process")
            _held.add(self._key)
        try:
            self._take()
        except BaseException:
            self._forget()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            with contextlib.suppress(OSError):
                if _read(self._owner) == self._about:
                    self._owner.unlink()
        elif self._is_in_place():
            self.path.unlink(missing_ok=True)
        self._forget()

    def _forget(self) -> None:
        if self._file >= 0:
            os.close(self._file)  # which releases the record lock
            self._file = -1
        with _held_guard:
            _held.discard(self._key)
        if self._made_folder:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # fails unless it is empty

    def _take(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            lockf(self._file, LOCK_EX | LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                self._take_by_heartbeat()
                return
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise self._refusal(_parsed(os.pread(self._file, _LIMIT, 0))) from None
        if not self._is_in_place():  # its holder has deleted it since it was opened
            os.close(self._file)
            self._file = -1
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take()
            return
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(self._about).encode(), 0)

    def _is_in_place(self) -> bool:
        """Whether the file that is locked is the one with the lock's name."""
        try:
            return os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def _take_by_heartbeat(self) -> None:
        """Makes the owner's file, after moving away one that was left behind."""
        if self._is_in_place():
            self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1
        owner = _read(self._owner)
        if owner:
            if not self._is_stale(owner):
                raise self._refusal(owner)
            self._move_away(owner)
        mine = self._beside("new")
        mine.write_text(json.dumps(self._about), encoding="utf-8")
        try:
            os.link(mine, self._owner)
        except FileExistsError:
            raise self._refusal(_read(self._owner)) from None
        finally:
            mine.unlink()
        time.sleep(TAKEOVER)
        if _read(self._owner) != self._about:  # moved away by another process, which had seen the stale file
            raise self._refusal(_read(self._owner))
        self._thread = threading.Thread(target=self._touch, name="hpdm-lock", daemon=True)
        self._thread.start()

    def _move_away(self, stale: dict[str, Any]) -> None:
        """Moves away the file that was left behind; one that was made meanwhile is put back."""
        moved = self._beside("stale")
        try:
            os.rename(self._owner, moved)
        except FileNotFoundError:
            return
        try:
            if _read(moved) != stale:
                os.link(moved, self._owner)
                raise self._refusal(_read(moved))
        finally:
            moved.unlink()

    def _beside(self, ending: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{self._about['token']}.{ending}")

    def _touch(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self._owner)

    def _is_stale(self, holder: dict[str, Any]) -> bool:
        if holder.get("host") == self._about["host"] and isinstance(holder.get("pid"), int):
            return start_of_process(holder["pid"]) != holder.get("started")
        # Compared with a file made now, because the clocks of the machines may differ.
        probe = self._beside("now")
        try:
            probe.touch()
            return probe.stat().st_mtime - self._owner.stat().st_mtime > STALE
        except FileNotFoundError:
            return True  # it has been removed meanwhile
        finally:
            probe.unlink(missing_ok=True)

    def _refusal(self, holder: dict[str, Any]) -> LockedError:
        about = "another process"
        if holder:
            about = (
                f"`{holder.get('work')}`, process {holder.get('pid')} on {holder.get('host')}, since "
                f"{holder.get('since')}"
            )
        return LockedError(
            f"{self.argument}: {self.subject} is in use by {about}; wait until it has ended, or choose another folder"
        )


def _parsed(data: bytes) -> dict[str, Any]:
    """The contents of a lock; empty where it has none yet, or others."""
    try:
        values: dict[str, Any] = parse_json(decode_text(data, NAME), dict[str, Any], NAME)
    except ValueError:
        return {}
    return values


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return _parsed(file.read(_LIMIT))
    except FileNotFoundError:
        return {}


def start_of_process(pid: int) -> str | None:
    """When a process of this machine started, in a unit of the system's own; ``None`` if it does not run.

    Where the system does not tell, it is the same text for every process that runs.
    """
    try:
        # The name of the command, in parentheses, may hold anything; the 20th field after it is the start.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it runs, and is somebody else's
    return "running"
