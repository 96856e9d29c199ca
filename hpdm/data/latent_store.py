"""A store of latents on disk: every clip of a set, encoded once by an autoencoder.

``hpdm data encode`` fills it, and :class:`hpdm.data.latent_clips.LatentDataset` reads training windows from it. Nothing
here encodes or decodes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from hpdm.checks import check_shape
from hpdm.data.fingerprint import Clips, ClipSet
from hpdm.files import atomic_path, make_folder, write_text
from hpdm.integrity import hash_of_json
from hpdm.json_file import Range, checked, read_json
from hpdm.tensor_file import TensorFile, write_tensors

FORMAT = 1
"""Version of the folder that :class:`LatentStore` writes."""
KEY_BYTES = 16  # of a SHA-256: among 10^8 clips, two are equal with a probability of 10^-23
_SAMPLED = 16  # clips whose latents count in a fingerprint
_Size = Annotated[int, Range(1, 2**20)]


@dataclass(frozen=True)
class LatentInfo:
    """How a store's latents were made, and of what. A store holds latents of one such description only."""

    autoencoder: Annotated[str, Range(64, 64)]
    """Hash of the weights, see :func:`hpdm.latent.latent_model.hash_of_autoencoder`."""
    channels: _Size
    """Of a latent, z."""
    factors: tuple[_Size, _Size, _Size]
    """Frames, height and width in pixels per latent."""
    size: tuple[_Size, _Size]
    """Height and width in pixels to which clips were resized and cropped."""
    stride: _Size
    """Step between frames."""
    fps: float | None
    """Frame rate to which clips were resampled before ``stride`` counts; ``None`` for each clip's own."""
    clips: Annotated[int, Range(1, 2**31 - 1)]
    """Number of clips of the set."""
    identity: Annotated[str, Range(64, 64)]
    """A hash of the names and sizes of all clips in their order."""

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width in latents."""
        height, width = (-(-n // factor) for n, factor in zip(self.size, self.factors[1:]))
        return height, width


class _Index(TypedDict):
    """The index of a store: the version, and a :class:`LatentInfo`."""

    format: Annotated[int, Range(0, 2**31)]


class Entry(NamedTuple):
    """A clip of a store."""

    number: int
    """In the set."""
    key: bytes
    """See :func:`clip_keys`."""
    frames: int
    """That were encoded; 0 for a clip that cannot be read."""
    latents: Tensor
    """Float16 ``[f, z, h, w]``, where the last of them may stand for fewer frames than the others."""


def clip_keys(clips: Clips) -> list[bytes]:
    """What each clip is found by: a hash of its name, relative to the set, and its size in bytes.

    So a set may move, or be packed into shards unchanged; labels and captions do not count.

    Raises:
        OSError: a file is gone.
    """
    records = ClipSet(clips, labeled=False).records()
    return [hashlib.sha256(json.dumps([r.name, r.size]).encode()).digest()[:KEY_BYTES] for r in records]


def identity_of(keys: Iterable[bytes]) -> str:
    """:attr:`LatentInfo.identity` of the clips with these keys."""
    return hashlib.sha256(b"".join(keys)).hexdigest()


class LatentStore:
    """A folder of latents, looked up by the numbers of clips.

    ``index.json`` is a :class:`LatentInfo`. Each ``latents-*.safetensors`` has n clips: ``numbers [n]``,
    ``keys [n, 16]``, ``frames [n]``, the latents of all of them one after another, ``rows [sum of f_i, z, h, w]``
    float16, and where those of each begin, ``starts [n + 1]``. Files are written atomically and named by their clips,
    so several processes can write to one folder, and what an interrupted one has written is complete. Rows are mapped
    and not read.

    Args:
        folder: what ``hpdm data encode`` wrote.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a newer format, or damaged files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.info = _read_index(self.folder)
        self._files: list[Path] = []
        self._open: dict[Path, TensorFile] = {}
        self.numbers = np.empty(0, np.int64)
        """Of the clips that it has, sorted."""
        self.keys = np.empty((0, KEY_BYTES), np.uint8)
        """Of each of these."""
        self.frames = np.empty(0, np.int64)
        """Of each of these; 0 for a clip that could not be read."""
        self._places = np.empty((0, 3), np.int64)  # of each: index into _files, first row, row after the last
        self._add_files(sorted(self.folder.glob("latents-*.safetensors")))

    @classmethod
    def create(cls, folder: str | Path, info: LatentInfo) -> LatentStore:
        """Opens the store in ``folder``, or creates it.

        Raises:
            ValueError: the folder has latents of something else.
        """
        folder = Path(folder)
        make_folder("out", folder)
        if not (folder / "index.json").exists():
            write_text(folder / "index.json", json.dumps({"format": FORMAT, **asdict(info)}, indent=2) + "\n")
        store = cls(folder)
        changed = differences(store.info, info)
        if changed:
            raise ValueError(f"out: {folder} holds other latents ({changed}); choose another folder")
        return store

    def __len__(self) -> int:
        return len(self.numbers)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # open files cannot be pickled; each process maps them itself

    @property
    def count(self) -> int:
        """Latents along time of all clips together."""
        return int((self._places[:, 2] - self._places[:, 1]).sum())

    def missing(self) -> list[int]:
        """The numbers of the clips that it does not have yet."""
        return np.setdiff1d(np.arange(self.info.clips), self.numbers, assume_unique=True).tolist()

    def rows(self, entry: int, first: int, count: int) -> Tensor:
        """Latents of a clip.

        Args:
            entry: place of the clip in :attr:`numbers`.
            first: the first of them.
            count: how many.

        Returns:
            float16 ``[count, z, h, w]``.

        Raises:
            IndexError: the clip has fewer.
        """
        file, start, stop = self._places[entry].tolist()
        if not 0 <= first <= first + count <= stop - start:
            raise IndexError(
                f"rows: got {first} to {first + count - 1}, expected some of the {stop - start} latents of clip "
                f"{self.numbers[entry]}"
            )
        return self._opened(self._files[file]).rows("rows", start + first, start + first + count)

    def add(self, entries: Sequence[Entry]) -> None:
        """Writes a file with these clips.

        Raises:
            OSError: it cannot be written; the store is then as before.
            ValueError: latents of another shape.
        """
        factor = self.info.factors[0]
        for entry in entries:
            shape = (-(-entry.frames // factor), self.info.channels, *self.info.latent_size)
            check_shape("latents", entry.latents, shape)
        keys = b"".join(entry.key for entry in entries)
        tensors = {
            "numbers": torch.tensor([entry.number for entry in entries]),
            "keys": torch.frombuffer(bytearray(keys), dtype=torch.uint8).reshape(-1, KEY_BYTES),
            "frames": torch.tensor([entry.frames for entry in entries]),
            "starts": torch.tensor([0, *np.cumsum([len(entry.latents) for entry in entries])]),
            "rows": torch.cat([entry.latents.half() for entry in entries]),
        }
        name = hash_of_json([entry.number for entry in entries])[:16]
        path = self.folder / f"latents-{name}.safetensors"
        with atomic_path(path) as temporary:
            write_tensors(temporary, tensors, {}, hashed=True)
        self._add_files([path])

    @cached_property
    def fingerprint(self) -> str:
        """A short text for what a run is trained on: the description, and the first latents of some clips."""
        digest = hashlib.sha256(hash_of_json(asdict(self.info)).encode())
        for entry in range(0, len(self), max(1, len(self) // _SAMPLED)):
            first = self.rows(entry, 0, min(1, int(self.frames[entry])))
            digest.update(first.contiguous().view(torch.uint8).numpy().tobytes())
        return f"{self.info.clips} clips, {digest.hexdigest()[:16]}"

    def _add_files(self, paths: Sequence[Path]) -> None:
        """Adds files to the lookup tables."""
        numbers, keys, frames, places = [self.numbers], [self.keys], [self.frames], [self._places]
        for path in paths:
            file = self._opened(path)
            read = {name: file.read(name).numpy() for name in ("numbers", "keys", "frames", "starts")}
            self._check_tables(path, read["numbers"], read["frames"], read["starts"])
            numbers.append(read["numbers"])
            keys.append(read["keys"])
            frames.append(read["frames"])
            of_file = np.full(len(read["numbers"]), len(self._files))
            places.append(np.stack((of_file, read["starts"][:-1], read["starts"][1:]), axis=1))
            self._files.append(path)
        # Of a clip that is in several files, the first file's entry is used.
        self.numbers, first = np.unique(np.concatenate(numbers), return_index=True)
        self.keys, self.frames = np.concatenate(keys)[first], np.concatenate(frames)[first]
        self._places = np.concatenate(places)[first]

    def _check_tables(self, path: Path, numbers: np.ndarray, frames: np.ndarray, starts: np.ndarray) -> None:
        """Raises ValueError for tables that contradict each other or the index."""
        rows = self._opened(path).shapes["rows"][0][0]
        lengths = -(-frames // self.info.factors[0])
        good = (
            numbers.min(initial=0) >= 0
            and numbers.max(initial=0) < self.info.clips
            and frames.min(initial=0) >= 0
            and starts[0] == 0
            and starts[-1] == rows
            and (np.diff(starts) == lengths).all()
        )
        if not good:
            raise ValueError(f"latents: {path} is damaged (its tables and its latents do not match)")

    def _opened(self, path: Path) -> TensorFile:
        """The file, mapped into memory and opened once.

        Raises:
            ValueError: it is damaged, or holds something else than this store's latents.
        """
        if path not in self._open:
            try:
                opened = TensorFile(path)
            except (ValueError, OSError) as error:
                raise ValueError(f"latents: {path} is damaged ({error}); delete it and encode again") from None
            sizes = {name: shape for name, (shape, _) in opened.shapes.items()}
            count, rows = (sizes[name][0] if sizes.get(name) else 0 for name in ("numbers", "rows"))
            expected = {
                "numbers": ((count,), torch.int64),
                "keys": ((count, KEY_BYTES), torch.uint8),
                "frames": ((count,), torch.int64),
                "starts": ((count + 1,), torch.int64),
                "rows": ((rows, self.info.channels, *self.info.latent_size), torch.float16),
            }
            if opened.shapes != expected:
                raise ValueError(f"latents: {path} has {dict(opened.shapes)}, expected {expected}")
            self._open[path] = opened
        return self._open[path]


def differences(before: LatentInfo, now: LatentInfo) -> str:
    """The fields that differ, as ``name: before -> now``; empty for equal ones."""
    old, new = asdict(before), asdict(now)
    return ", ".join(f"{name}: {_short(old[name])} -> {_short(new[name])}" for name in new if old[name] != new[name])


def _short(value: object) -> str:
    return value[:16] if isinstance(value, str) else f"{value}"


def _read_index(folder: Path) -> LatentInfo:
    """Reads a store's ``index.json``; errors as :class:`LatentStore`."""
    path = folder / "index.json"
    if not path.is_file():
        raise FileNotFoundError(f"latents: no index.json in {folder}, expected a folder that `hpdm data encode` wrote")
    try:
        values = read_json(path, _Index)
        version = values.pop("format")
        if version > FORMAT:
            raise ValueError(f"{path}: format {version}, from a newer version, expected at most {FORMAT}")
        info: LatentInfo = checked(values, LatentInfo, f"{path}")
    except ValueError as error:
        raise ValueError(f"latents: {error}") from None
    return info
