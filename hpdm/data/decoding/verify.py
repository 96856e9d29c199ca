"""Decoding a whole file strictly, to find damage that a codec would conceal."""

from __future__ import annotations

from collections.abc import Callable

from hpdm.data.decoding.container import decode, open_video
from hpdm.data.decoding.scan import Scan


def verify(url: str, scan: Scan, progress: Callable[[], None] = lambda: None) -> None:
    """Decodes every frame, with the codec set to fail at damage instead of concealing it.

    Args:
        url: as :func:`~hpdm.data.decoding.container.locate` gives it.
        scan: of that file.
        progress: called at every frame.

    Raises:
        ValueError: damaged or missing frames.
    """
    count = 0

    def lost() -> None:
        # What comes before the first frame is the rest of a group of pictures whose start is not in the file.
        if count:
            raise ValueError(f"packets before frame {count} of {scan.frames} cannot be decoded")

    with open_video(url, scan.number) as (container, stream):
        stream.codec_context.options |= {"err_detect": "explode+crccheck+bitstream+buffer"}
        for frame in decode(container, stream, lost=lost):
            if frame.is_corrupt:
                raise ValueError(f"frame {count} of {scan.frames} is damaged")
            count += 1
            progress()
    if count < scan.frames:
        raise ValueError(f"only {count} of {scan.frames} frames can be decoded")
