"""Files of encoders that PyAV does not have, or does not run in two passes: the ffmpeg program writes them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.video import claims
from tests.video.cases import Case
from tests.video.encoding import Video, write
from tests.video.truth import FFMPEG


def _by_command(*passes: tuple[str, ...]) -> Callable[[Path], None]:
    """Encodes the pictures with the ffmpeg program, run with each of the lists of options in turn."""

    def make(path: Path) -> None:
        with TemporaryDirectory() as folder:
            plain = Path(folder) / "plain.avi"
            write(plain, Video("ffvhuff", gop=1))
            for number, options in enumerate(passes, start=1):
                target = str(path) if number == len(passes) else "-"
                command = [FFMPEG or "ffmpeg", "-v", "error", "-y", "-threads", "1", "-i", str(plain), *options, target]
                subprocess.run(command, check=True, timeout=60, cwd=folder, stdout=subprocess.DEVNULL)

    return make


def _two_passes(codec: str, *options: str) -> Callable[[Path], None]:
    """Encodes with knowledge of the whole video, without which libvpx makes no alternate references."""
    common = ("-c:v", codec, "-b:v", "600k", "-auto-alt-ref", "1", "-lag-in-frames", "25", "-cpu-used", "4", *options)
    return _by_command((*common, "-pass", "1", "-f", "null"), (*common, "-pass", "2"))


def _written_by_command() -> list[Case]:
    theora, xvid = ("-c:v", "libtheora", "-q:v", "8"), ("-c:v", "libxvid", "-q:v", "3", "-bf", "2")
    aom = ("-c:v", "libaom-av1", "-cpu-used", "8", "-g", "20", "-crf", "20", "-b:v", "0")
    packed, alt8, alt9 = "MPEG-4 packed B-frames", "VP8 alternate references", "VP9 alternate references"
    two_vops = claims.two_vops_in_a_packet
    short, long = ("-g", "20", "-keyint_min", "20"), ("-g", "300")
    return [
        _command_case("theora.ogv", "Theora", _by_command((*theora, "-g", "12"))),
        _command_case("theora-long-gop.ogv", "Theora", _by_command((*theora, "-g", "64"))),
        _command_case("theora.mkv", "Theora", _by_command((*theora, "-g", "12"))),
        _command_case("libxvid.avi", packed, _by_command((*xvid, "-g", "12", "-flags", "+cgop")), two_vops),
        _command_case("libxvid-open-gop.avi", packed, _by_command((*xvid, "-g", "12")), two_vops),
        _command_case("libxvid.mp4", "MPEG-4", _by_command((*xvid, "-g", "12"))),
        _command_case("libaom.mkv", "AV1", _by_command(aom), claims.hidden_av1),
        _command_case("libaom.mp4", "AV1", _by_command(aom), claims.hidden_av1),
        _command_case("vp8-alt-ref.webm", alt8, _two_passes("libvpx", *short), claims.hidden_vp8),
        _command_case("vp8-alt-ref.mkv", alt8, _two_passes("libvpx", *short), claims.hidden_vp8),
        _command_case("vp8-alt-ref.ogv", alt8, _two_passes("libvpx", *short), claims.hidden_vp8),
        _command_case("vp8-alt-ref-long-gop.webm", alt8, _two_passes("libvpx", *long), claims.hidden_vp8),
        _command_case("vp9-alt-ref.webm", alt9, _two_passes("libvpx-vp9", *short), claims.hidden_vp9),
        _command_case("vp9-alt-ref.mkv", alt9, _two_passes("libvpx-vp9", *short), claims.hidden_vp9),
        _command_case("vp9-alt-ref.mp4", alt9, _two_passes("libvpx-vp9", *short), claims.hidden_vp9),
        _command_case("vp9-alt-ref-long-gop.webm", alt9, _two_passes("libvpx-vp9", *long), claims.hidden_vp9),
    ]


def _command_case(name: str, kind: str, make: Callable[[Path], None], *wanted: claims.Claim) -> Case:
    return Case(name, kind, make, claims=wanted, needs_command=True)


CASES = _written_by_command()
