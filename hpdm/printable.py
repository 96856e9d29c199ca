"""Text from files made safe for a terminal: names and captions may hold bytes that a terminal obeys."""

from __future__ import annotations

import logging

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


def _is_hidden(character: str) -> bool:
    number = ord(character)
    return number < 32 or 127 <= number < 160 or 0xD800 <= number < 0xE000 or character in _MISLEADING


class PrintableFormatter(logging.Formatter):
    """A formatter whose lines are safe for a terminal; line breaks and tabs stay."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text, escaped."""
        return printable(super().format(record), keep="\n\t")
