"""Text from files made safe for a terminal, which obeys some characters, and as a part of a file's name."""

from __future__ import annotations

import io
import logging
import re
from typing import TextIO

# Marks of writing direction, which can make a name look like another one, and Unicode's two line separators.
_MISLEADING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\ufeff")


def printable(text: str, keep: str = "") -> str:
    r"""The text with every character that does not show as itself written as an escape, such as ``\x1b``.

    Escaped are control characters, lone surrogates (bytes of a name that are not UTF-8) and marks of writing direction.

    Args:
        text: any text.
        keep: characters to leave as they are, such as a newline.
    """
    return "".join(c if c in keep or not _is_hidden(c) else c.encode("unicode_escape").decode() for c in text)


def as_file_name(text: str) -> str:
    """A text as a part of the name of one file, in no other folder: what could lead elsewhere or hide is ``%XX``.

    Different texts give different names. ``playing guitar/bass`` becomes ``playing guitar%2Fbass``.

    Args:
        text: any text, such as a class name out of a file.
    """
    return "".join(
        "".join(f"%{byte:02X}" for byte in c.encode(errors="surrogatepass")) if _misleads(text, place) else c
        for place, c in enumerate(text)
    )


def _misleads(text: str, place: int) -> bool:
    """Whether a character of a text could mean something else than itself in the name of a file."""
    character = text[place]
    is_escape = character == "%" and re.fullmatch("[0-9A-F]{2}", text[place + 1 : place + 3]) is not None
    return character in "/\\" or (character == "." and place == 0) or is_escape or _is_hidden(character)


def _is_hidden(character: str) -> bool:
    number = ord(character)
    return number < 32 or 127 <= number < 160 or 0xD800 <= number < 0xE000 or character in _MISLEADING


class PrintableFormatter(logging.Formatter):
    """A formatter whose lines are safe for a terminal; line breaks and tabs stay."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text, escaped."""
        return printable(super().format(record), keep="\n\t")


class PrintableStream(io.TextIOBase):
    """A stream for ``sys.stdout`` that is safe for a terminal; line breaks and tabs stay.

    Args:
        stream: where the escaped text goes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text, escaped; returns the number of characters of the text itself."""
        self._stream.write(printable(text, keep="\n\t"))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        self._stream.flush()

    def fileno(self) -> int:
        """The stream's descriptor."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()
