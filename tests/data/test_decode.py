"""Reading videos: exact frames from both decoders, damaged and odd files, hangs and crashes of a decoder."""

import logging
import os
import signal
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from hpdm.data import decoder_process
from hpdm.data.decode import DecodeError, StalledError, probe, read_clip, verify
from hpdm.data.decoding import messages
from hpdm.data.decoding.scan import scan
from hpdm.data.decoding.with_pyav import Changed, Reader
from hpdm.video import write_video


def numbered(frames, height=64, width=64):
    """Frames whose brightness tells their number, over a fixed pattern that tells up from down and left from right."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[:, : height // 4, :, 0] = 200
    video[:, :, : width // 4, 2] = 200
    video[:, height // 2 :, width // 2 :] = (20 + 200 * np.arange(frames) / max(1, frames - 1))[:, None, None, None]
    return video


def number_of(frame, frames):
    height, width = frame.shape[:2]
    value = frame[height * 5 // 8 : height * 7 // 8, width * 5 // 8 : width * 7 // 8].mean()
    return round((value - 20) * (frames - 1) / 200)


def encode(path, videos, codec="libx264", pix_fmt="yuv420p", options=None, **container):
    """Writes one stream per video."""
    with av.open(str(path), "w", **container) as out:
        streams = []
        for video in videos:
            stream = out.add_stream(codec, rate=Fraction(10), options=options or {})
            stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], pix_fmt
            streams.append(stream)
        for stream, video in zip(streams, videos):
            for image in video:
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                out.mux(stream.encode(frame.reformat(format=pix_fmt)))
            out.mux(stream.encode(None))
    return path


SHORT_GOP = {"crf": "8", "g": "6", "keyint_min": "6", "bf": "2", "sc_threshold": "0"}


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_window_is_exact_wherever_it_starts(tmp_path, decoder):
    path = encode(tmp_path / "a.mp4", [numbered(40)], options=SHORT_GOP)
    assert probe(path).frames == 40
    whole = read_clip(path, range(40), decoder=decoder).frames
    assert [number_of(frame, 40) for frame in whole] == list(range(40))
    for start in range(0, 36, 5):
        window = read_clip(path, range(start, start + 4), decoder=decoder)
        assert window.decoder == decoder
        assert np.array_equal(window.frames, whole[start : start + 4])
    picked = [31, 2, 2, 17]
    assert np.array_equal(read_clip(path, picked, decoder=decoder).frames, whole[picked])


def test_only_the_window_is_decoded(tmp_path):
    path = str(encode(tmp_path / "a.mp4", [numbered(60)], options=SHORT_GOP))
    found = scan(path)
    assert [number for number, _ in found.entries] == list(range(0, 60, 6))
    decoded = []
    frames = list(Reader(path, found).read([50, 51], lambda: decoded.append(1)))
    assert len(frames) == 2
    assert len(decoded) <= 6, "the keyframe before is frame 48"
    assert [number_of(frame, 60) for frame in frames] == [50, 51]


def test_a_seek_that_lands_elsewhere_is_noticed_and_mended(tmp_path):
    path = str(encode(tmp_path / "a.mp4", [numbered(60)], options=SHORT_GOP))
    found = scan(path)
    right = list(Reader(path, found).read([50, 51]))
    late = found.entries[-1][1]
    for wrong in ([(n, late) for n, _ in found.entries], [(n, found.entries[2][1]) for n, _ in found.entries]):
        found.entries = wrong
        reader = Reader(path, found)
        for _ in range(2):
            assert np.array_equal(list(reader.read([50, 51])), right)


def test_frames_that_are_no_longer_those_of_the_scan_are_never_returned(tmp_path):
    path = str(encode(tmp_path / "a.mp4", [numbered(20)], options=SHORT_GOP))
    found = scan(path)
    found.checksums[9] ^= 1
    reader = Reader(path, found)
    assert len(list(reader.read([7, 8]))) == 2
    got = []
    with pytest.raises(Changed):
        got.extend(reader.read([8, 9, 10]))
    assert len(got) <= 1


def test_a_file_that_changed_behind_a_scan_is_scanned_again(tmp_path, worker):
    path = encode(tmp_path / "a.mp4", [numbered(12)], options=SHORT_GOP)
    read_clip(path, [0])
    before, turned = path.stat(), numbered(12)[:, :, ::-1]
    encode(path, [turned], options=SHORT_GOP)
    data = path.read_bytes()
    path.write_bytes(data[: before.st_size] + bytes(max(0, before.st_size - len(data))))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with av.open(str(path)) as container:
        truth = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for decoder in ("pyav", "auto"):
        assert np.array_equal(read_clip(path, range(6), decoder=decoder).frames, truth[:6])


def test_decoders_agree_bit_for_bit(tmp_path, generator):
    noise = torch.randint(0, 256, (3, 12, 32, 64), generator=generator, dtype=torch.uint8)
    write_video(tmp_path / "a.mp4", noise)
    both = [read_clip(tmp_path / "a.mp4", [3, 11, 0], decoder=name).frames for name in ("decord", "pyav")]
    assert np.array_equal(*both)


def test_probe_describes_the_file(tmp_path):
    info = probe(encode(tmp_path / "a.mp4", [numbered(9, 48, 80)]))
    assert (info.frames, info.height, info.width, info.fps) == (9, 48, 80, 10)
    assert (info.codec, info.video_streams, info.stream) == ("h264", 1, 0)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "options"),
    [
        ("a.gif", "gif", "rgb8", {}),
        ("a.mkv", "libsvtav1", "yuv420p", {"preset": "12", "svtav1-params": "lp=1"}),
    ],
)
def test_pyav_reads_what_decord_cannot_and_says_so(tmp_path, worker, name, codec, pix_fmt, options):
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV has no {codec} encoder")
    path = encode(tmp_path / name, [numbered(8)], codec, pix_fmt, options)
    with pytest.raises(DecodeError, match="decord"):
        read_clip(path, [0], decoder="decord")
    clip = read_clip(path, [5, 6])
    assert clip.decoder == "pyav"
    assert [number_of(frame, 8) for frame in clip.frames] == pytest.approx([5, 6], abs=1)
    assert clip.doubt == f"{probe(path).codec} in {'gif' if name == 'a.gif' else 'matroska'}"


@pytest.mark.parametrize("options", [{"g": "6", "bf": "2"}, {"g": "6", "bf": "0"}, {"g": "250", "bf": "2"}])
@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mkv", "libx264"),
        ("a.avi", "libx264"),
        ("a.ts", "libx264"),
        ("a.mp4", "mpeg4"),
        ("a.avi", "mpeg4"),
        ("a.mpg", "mpeg2video"),
        ("a.wmv", "wmv2"),
        ("a.webm", "libvpx"),
    ],
)
def test_every_single_frame_is_the_one_asked_for(tmp_path, name, codec, options):
    """Decord alone fails this in many of these cases: it seeks to wrong frames without saying so."""
    if codec in ("wmv2", "libvpx"):
        options = {"g": options["g"]}
    path = encode(tmp_path / name, [numbered(24)], codec, options={**options, "b": "2000000"})
    assert probe(path).frames == 24
    whole = read_clip(path, range(24), decoder="pyav").frames
    assert [number_of(frame, 24) for frame in whole] == pytest.approx(list(range(24)), abs=1)
    for index in range(0, 24, 3):
        for decoder in ("auto", "pyav"):
            assert np.array_equal(read_clip(path, [index], decoder=decoder).frames[0], whole[index])


def test_of_two_video_streams_ffmpegs_best_is_read(tmp_path):
    small, large = numbered(6, 32, 32), numbered(6, 64, 64)
    for name, videos in (("a.mp4", [small, large]), ("b.mp4", [large, small])):
        path = encode(tmp_path / name, videos)
        with av.open(str(path)) as container:
            best = container.streams.best("video").index
        info = probe(path)
        assert (info.video_streams, info.stream, info.height) == (2, best, videos[best].shape[1])
        clip = read_clip(path, [0, 5])
        assert clip.decoder == "pyav"
        assert clip.frames.shape == (2, *videos[best].shape[1:])
        assert [number_of(frame, 6) for frame in clip.frames] == [0, 5]
        with pytest.raises(DecodeError, match="2 video streams"):
            read_clip(path, [0], decoder="decord")


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],
    ids=["clockwise", "half", "counter-clockwise"],
)
def test_frames_stored_turned_are_upright(tmp_path, matrix, turns):
    upright = numbered(5, 48, 64)
    path = encode(tmp_path / "a.mp4", [np.rot90(upright, -turns, axes=(1, 2))])
    data = bytearray(path.read_bytes())
    # tkhd version 0: the 3x3 matrix of 16.16 numbers starts 44 bytes after the box's name.
    at = data.index(b"tkhd") + 4 + 40
    assert data[at : at + 4] == b"\x00\x01\x00\x00"
    a, b, c, d = ((n * 65536).to_bytes(4, "big", signed=True) for n in matrix)
    data[at : at + 8], data[at + 12 : at + 20] = a + b, c + d
    path.write_bytes(data)
    info = probe(path)
    assert (info.height, info.width) == (48, 64)
    clip = read_clip(path, range(5))
    assert np.abs(clip.frames.astype(int) - upright).mean() < 8


def test_bad_calls(tmp_path):
    path = encode(tmp_path / "a.mp4", [numbered(4)])
    for decoder in ("auto", "decord", "pyav"):
        for index in (4, -1):
            with pytest.raises(IndexError, match=f"frame {index} asked, the video has 4"):
                read_clip(path, [0, index], decoder=decoder)
    with pytest.raises(ValueError, match="indices: got none"):
        read_clip(path, [])
    with pytest.raises(ValueError, match="decoder: got 'ffmpeg'"):
        read_clip(path, [0], decoder="ffmpeg")
    with pytest.raises(ValueError, match="timeout: got 0"):
        probe(path, timeout=0)
    for call in (probe, verify, lambda p: read_clip(p, [0])):
        with pytest.raises(FileNotFoundError, match=r"nothing\.mp4 is not a file"):
            call(tmp_path / "nothing.mp4")


@pytest.mark.parametrize(
    "content", [b"", b"just some text\n" * 50, bytes(range(256)) * 40], ids=["empty", "text", "bytes"]
)
def test_a_file_that_is_not_a_video(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    for call in (probe, verify, lambda p: read_clip(p, [0])):
        with pytest.raises(DecodeError, match=r"a\.mp4"):
            call(path)


def test_a_file_with_sound_alone(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with pytest.raises(DecodeError, match="holds no video stream"):
        probe(path)


def test_cut_off_file_has_the_frames_that_are_left(tmp_path):
    """The index comes first in the file, so its header goes on to claim all frames."""
    path = encode(
        tmp_path / "a.mp4",
        [numbered(30)],
        options={**SHORT_GOP, "bf": "0"},
        container_options={"movflags": "faststart"},
    )
    whole = read_clip(path, range(30)).frames
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2])
    left = probe(path).frames
    assert 5 < left < 30
    last = left - 2  # the very last packet may be cut through
    for decoder in ("auto", "pyav"):
        assert np.array_equal(read_clip(path, range(last), decoder=decoder).frames, whole[:last])
        with pytest.raises(IndexError, match=f"the video has {left}"):
            read_clip(path, [29], decoder=decoder)


def test_cut_off_before_the_index(tmp_path):
    path = encode(tmp_path / "a.mp4", [numbered(30)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DecodeError, match="cannot be decoded"):
        read_clip(path, [0])


def test_damage_inside_is_found(tmp_path, generator):
    noise = torch.randint(0, 256, (3, 20, 64, 64), generator=generator, dtype=torch.uint8)
    path = tmp_path / "a.mp4"
    write_video(path, noise)
    verify(path)
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    data[middle : middle + 4000] = bytes(4000)
    path.write_bytes(data)
    with pytest.raises(DecodeError, match=r"a\.mp4"):
        verify(path)
    left = probe(path).frames
    assert left < 20
    for decoder in ("pyav", "auto"):
        with pytest.raises(DecodeError, match=r"a\.mp4: cannot be decoded: .* of \d+ (is damaged|cannot be decoded)"):
            read_clip(path, range(left), decoder=decoder)
        assert len(read_clip(path, range(4), decoder=decoder).frames) == 4


def test_a_hang_in_decord_is_stopped_and_read_with_pyav(tmp_path, worker, caplog, patch_worker):
    patch_worker("with_decord.read = lambda *_: time.sleep(600)")
    path = encode(tmp_path / "a.mp4", [numbered(4)])
    probe(path)
    first = worker.process
    with caplog.at_level(logging.INFO, "hpdm.data.decode"):
        clip = read_clip(path, [2], timeout=1)
    assert clip.decoder == "pyav"
    assert number_of(clip.frames[0], 4) == 2
    assert first.poll() == -signal.SIGKILL
    assert "no answer within 1 s" in caplog.text
    start = time.monotonic()
    assert read_clip(path, [3], timeout=30).decoder == "pyav"
    assert time.monotonic() - start < 15, "decord is not tried again on this file"


def test_a_hang_everywhere_names_the_file(tmp_path, worker, patch_worker):
    patch_worker("with_decord.read = with_pyav.Reader.read = lambda *_: time.sleep(600)")
    path = encode(tmp_path / "a.mp4", [numbered(4)])
    with pytest.raises(StalledError, match=r"a\.mp4: no answer within 2 s, decoder stopped, after 3 tries"):
        read_clip(path, [2], timeout=0.5)
    assert worker.process is None


def test_slow_work_is_no_hang(tmp_path, patch_worker):
    patch_worker(
        "real = scan.checksum\n"
        "def slow(frame):\n    time.sleep(0.3)\n    return real(frame)\n"
        "scan.checksum = with_pyav.checksum = slow"
    )
    path = encode(tmp_path / "a.mp4", [numbered(12)])
    assert read_clip(path, range(12), decoder="pyav", timeout=1).frames.shape[0] == 12


def test_a_read_that_stalls_once_is_tried_again(tmp_path, patch_worker, caplog):
    once = tmp_path / "once"
    patch_worker(
        "real = with_pyav.Reader.read\n"
        "def slow(*rest):\n"
        f"    if not os.path.exists({str(once)!r}):\n"
        f"        open({str(once)!r}, 'w').close()\n"
        "        time.sleep(600)\n"
        "    return real(*rest)\n"
        "with_pyav.Reader.read = slow"
    )
    path = encode(tmp_path / "a.mp4", [numbered(4)])
    with caplog.at_level(logging.WARNING, "hpdm.data.decode"):
        assert number_of(read_clip(path, [3], decoder="pyav", timeout=1).frames[0], 4) == 3
    assert "a.mp4: no answer within 1 s, decoder stopped; tried again with more time" in caplog.text


def test_a_crash_names_the_file_and_the_next_call_works(tmp_path, patch_worker):
    good = encode(tmp_path / "good.mp4", [numbered(4)])
    bad = encode(tmp_path / "bad.mp4", [numbered(4)])
    body = (
        "real = with_pyav.Reader.read\n"
        "def crash(self, *rest):\n    os.abort() if 'bad' in self.url else None\n    return real(self, *rest)\n"
        "with_pyav.Reader.read = crash\n"
        "with_decord.why_not = lambda scan: 'a test'"
    )
    patch_worker(body)
    with pytest.raises(DecodeError, match=r"bad\.mp4: cannot be decoded: the decoding process died \(exit status -6\)"):
        read_clip(bad, [0])
    assert number_of(read_clip(good, [3]).frames[0], 4) == 3


def test_a_worker_that_cannot_start_says_why(tmp_path, patch_worker):
    path = encode(tmp_path / "a.mp4", [numbered(2)])
    patch_worker("def fail(): raise ImportError('no codec here')\nserver.quiet = fail")
    with pytest.raises(RuntimeError, match="did not start: ImportError: no codec here"):
        probe(path)


def test_a_hung_worker_ends_without_its_parent(tmp_path, worker, patch_worker):
    """The parent may be killed while a decoder hangs; the alarm is what is left."""
    patch_worker("server.GRACE_S = 0; with_pyav.Reader.read = lambda *_: time.sleep(600)")
    path = encode(tmp_path / "a.mp4", [numbered(2)])
    probe(path)
    process = worker.process
    request = {"op": "read", "path": str(path), "numbers": [0], "decoder": "pyav", "timeout": 1}
    messages.send(process.stdin, request)
    assert process.wait(timeout=20) == -signal.SIGALRM


def test_without_decord_everything_is_read_with_pyav(tmp_path, patch_worker):
    path = encode(tmp_path / "a.mp4", [numbered(4)])
    patch_worker("sys.modules['decord'] = None")
    assert read_clip(path, [1]).decoder == "pyav"
    with pytest.raises(DecodeError, match=r"a\.mp4: cannot be decoded: decord does not .*: decord cannot be imported"):
        read_clip(path, [1], decoder="decord")


def test_relative_paths_follow_this_process(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        encode(tmp_path / name / "a.mp4", [numbered(4 if name == "one" else 7)])
        monkeypatch.chdir(tmp_path / name)
        assert probe("a.mp4").frames == (4 if name == "one" else 7)


def test_an_interrupt_leaves_no_stale_reply(tmp_path, worker, monkeypatch):
    path = encode(tmp_path / "a.mp4", [numbered(6)])
    read_clip(path, [0])
    real = decoder_process.DecoderProcess.receive

    def interrupted(self, deadline):
        monkeypatch.setattr(decoder_process.DecoderProcess, "receive", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder_process.DecoderProcess, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_clip(path, [1])
    assert number_of(read_clip(path, [4]).frames[0], 6) == 4


def test_a_forked_process_reads_with_a_worker_of_its_own(tmp_path, worker):
    path = encode(tmp_path / "a.mp4", [numbered(6)])
    read_clip(path, [0])
    os.register_at_fork(after_in_child=worker.forget)  # as the module does for its own
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        result = b"?"
        try:
            result = b"%d" % number_of(read_clip(path, [3]).frames[0], 6)
            worker.stop()
        finally:
            os.write(send, result)
            os._exit(0)
    assert number_of(read_clip(path, [5]).frames[0], 6) == 5
    assert os.read(receive, 8) == b"3"
    os.waitpid(child, 0)
    assert number_of(read_clip(path, [2]).frames[0], 6) == 2


def test_a_reader_that_takes_its_time_ends_no_decoder(tmp_path, patch_worker):
    """While frames are being sent, nothing else is heard of the decoding process, and its alarm must not go off."""
    patch_worker("server.GRACE_S = 0")
    path = encode(tmp_path / "a.mp4", [numbered(40, 256, 256)])

    def slow(frame):
        time.sleep(0.1)
        return frame

    clip = read_clip(path, range(40), decoder="pyav", timeout=2, transform=slow)  # 4 s in all
    assert [number_of(frame, 40) for frame in clip.frames] == list(range(40))
