"""Text conditioning: a frozen T5 encoder, a store of embeddings on disk, and batches of them with a mask.

The paper's text-to-video models are conditioned on embeddings of T5-11B (Table 8). The encoder is frozen, so ``hpdm
data embed`` computes them once with :class:`TextEncoder` into an :class:`EmbeddingStore`, and :func:`collate_text`
makes batches for a model. An empty caption has no tokens at all, like a caption that conditioning dropout drops.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from hpdm.checks import check_choice
from hpdm.files import atomic_path, make_folder, numbered_lines, write_text
from hpdm.json_file import Range, checked, read_json
from hpdm.tensor_file import TensorFile, write_tensors

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
MAX_LENGTH = 128
"""Longest caption in tokens; longer ones are cut."""
FORMAT = 1
"""Version of the folder that :class:`EmbeddingStore` writes."""
SHARD_BYTES = 256 * 2**20
"""Bytes of embeddings to collect in memory before writing them to a file."""
MAX_PROMPT_BYTES = 64 * 1024
"""Longest line of a file of prompts."""
_KEY_BYTES = 16  # of a caption's SHA-256: among 10^8 captions, two are equal with a probability of 10^-23
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EmbeddingInfo:
    """How a store's embeddings were made. A store holds embeddings of one such description only."""

    encoder: str
    """Name of the encoder, the last part of its folder or hub name."""
    width: Annotated[int, Range(1, 2**20)]
    """Channels of an embedding."""
    max_length: Annotated[int, Range(1, 2**20)]
    """Longest caption in tokens."""
    precision: Precision
    """Of the encoder's weights and of the embeddings."""


class _Index(TypedDict):
    """The index of a store: the version, and an :class:`EmbeddingInfo`."""

    format: Annotated[int, Range(0, 2**31)]


def normalize_caption(caption: str) -> str:
    """The caption with each run of white space as one space and none at its ends, as T5 reads it."""
    return " ".join(caption.split())


class TextEncoder:
    """A frozen T5 encoder, or another text encoder of ``transformers`` (mT5, UMT5).

    Args:
        name: local folder with the model and its tokenizer, or a name on the hub.
        max_length: longest caption in tokens, >= 1; longer ones are cut, with a warning.
        device: where it runs.
        precision: ``"fp32"`` or ``"bf16"``, of weights and embeddings. T5 overflows in fp16.
        download: download what is not in the local cache.

    Raises:
        ImportError: ``transformers`` is not installed.
        OSError: no such model, or it is not in the local cache and ``download`` is off.
        ValueError: an argument out of range, no tokenizer, or a model that is no text encoder.
    """

    def __init__(
        self,
        name: str | Path,
        *,
        max_length: int = MAX_LENGTH,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
        download: bool = False,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length: got {max_length}, expected at least 1")
        check_choice("precision", precision, Precision)
        try:
            from transformers import AutoModelForTextEncoding, AutoTokenizer  # deferred: seconds to import
        except ImportError as error:
            raise ImportError("text encoder: needs transformers; install hpdm[t2v]") from error
        self.device, source = torch.device(device), {"local_files_only": not download}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(name), **source)
            model = AutoModelForTextEncoding.from_pretrained(str(name), dtype=_DTYPES[precision], **source)
        except ImportError:  # a package that the tokenizer needs, which the message names
            raise
        except Exception as error:  # transformers raises errors of many types for damaged files
            expected = "the folder of a T5 model and its tokenizer, or its name on the hub"
            note = "" if download else "; one that is not in the local cache yet needs --download"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"encoder: got {str(name)!r}, expected {expected}{note} ({reason})") from error
        # Where the tokenizer's files are missing, transformers makes one whose only token is the space.
        if len(self.tokenizer) - len(self.tokenizer.all_special_ids) <= 1:
            raise ValueError(f"encoder: got {str(name)!r}, which has no tokenizer beside the model")
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.info = EmbeddingInfo(Path(name).name, int(model.config.hidden_size), max_length, precision)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Encodes captions.

        Returns:
            Per caption ``[S_i, W]`` on the CPU, in the encoder's precision and without padding; ``[0, W]`` for an empty
            caption.
        """
        texts = [normalize_caption(caption) for caption in captions]
        not_empty = [text for text in texts if text]
        embeddings = iter(self._encode(not_empty) if not_empty else [])
        empty = torch.empty(0, self.info.width, dtype=_DTYPES[self.info.precision])
        return [next(embeddings) if text else empty for text in texts]

    def _encode(self, texts: list[str]) -> list[Tensor]:
        """Encodes texts that are not empty as one batch."""
        limit = self.info.max_length
        lengths = [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
        too_long = [text for text, length in zip(texts, lengths) if length > limit]
        if too_long:
            logger.warning("%d captions cut to %d tokens, the first: %.80s...", len(too_long), limit, too_long[0])
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        ids, mask = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)  # [B, S]
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # [B, S, W]
        return [row[is_token].cpu() for row, is_token in zip(states, mask.bool())]


def collate_text(texts: Sequence[Tensor], multiple: int = 16) -> tuple[Tensor, Tensor]:
    """Embeddings of several captions as one batch.

    Args:
        texts: per caption ``[S_i, W]``, any float dtype; ``S_i`` may be 0 for no text.
        multiple: the length is rounded up to a multiple of it, so that compiled graphs and memory pools see few shapes
            and fused attention can load aligned rows. The model's results do not depend on it.

    Returns:
        ``text [B, S, W]`` float32, zero after each caption's end, and its mask ``[B, S]`` bool, on the CPU.

    Raises:
        ValueError: no texts, other ranks than 2, or differing widths.
    """
    shapes = [tuple(text.shape) for text in texts]
    if not shapes or any(len(shape) != 2 for shape in shapes) or len({width for _, width in shapes}) > 1:
        raise ValueError(f"texts: got shapes {shapes}, expected one or more of [S_i, W] of one width W")
    length = max(1, -(-max(rows for rows, _ in shapes) // multiple)) * multiple
    text = torch.zeros(len(texts), length, shapes[0][1])
    for row, (embedding, (rows, _)) in enumerate(zip(texts, shapes)):
        text[row, :rows] = embedding
    return text, torch.arange(length) < torch.tensor([[rows] for rows, _ in shapes])


class EmbeddingStore:
    """A folder of embeddings, looked up by their captions.

    ``index.json`` is an :class:`EmbeddingInfo`. Each ``embeddings-*.safetensors`` has the embeddings of n captions one
    after another, ``rows [sum of S_i, W]``, where each begins, ``starts [n + 1]``, and ``keys [n, 16]``, the captions'
    hashes. So sets in any layout can share a store, and a repeated caption is stored once. Files are written atomically
    and named by their captions, so that several processes can write to the same folder. Rows are mapped and not read,
    so an open store takes 32 bytes of memory per caption.

    Args:
        folder: what ``hpdm data embed`` wrote.
        width: the width that the embeddings must have, a model's ``config.text_width``; ``None`` for any.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another width, a newer format, or damaged files.
    """

    def __init__(self, folder: str | Path, width: int | None = None) -> None:
        self.folder = Path(folder)
        self.info = _read_index(self.folder)
        if width is not None and width != self.info.width:
            raise ValueError(
                f"embeddings: {self.folder} has width {self.info.width} ({self.info.encoder}), expected "
                f"config.text_width = {width}"
            )
        self._files: list[Path] = []
        self._open: dict[Path, TensorFile] = {}
        self._keys = np.empty(0, f"S{_KEY_BYTES}")  # sorted
        self._places = np.empty((0, 2), np.int64)  # of each key: index into _files, entry in that file
        self._add_files(sorted(self.folder.glob("embeddings-*.safetensors")))

    @classmethod
    def create(cls, folder: str | Path, info: EmbeddingInfo) -> EmbeddingStore:
        """Opens the store in ``folder``, or creates it.

        Raises:
            ValueError: the folder has embeddings of another encoder, width, length or precision.
        """
        folder = Path(folder)
        make_folder("out", folder)
        if not (folder / "index.json").exists():
            write_text(folder / "index.json", json.dumps({"format": FORMAT, **asdict(info)}, indent=2) + "\n")
        store = cls(folder)
        old, new = asdict(store.info), asdict(info)
        changed = ", ".join(f"{name}: {old[name]} -> {new[name]}" for name in new if old[name] != new[name])
        if changed:
            raise ValueError(f"out: {folder} holds other embeddings ({changed}); choose another folder")
        return store

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, caption: str) -> bool:
        return self._find(caption) is not None

    def __getitem__(self, caption: str) -> Tensor:
        """The embedding of a caption, ``[S, W]`` in the store's precision.

        Raises:
            ValueError: the store does not have the caption.
        """
        place = self._find(caption)
        if place is None:
            raise ValueError(
                f"caption: {caption!r} is not in {self.folder}; run `hpdm data embed` with --data or --prompts first"
            )
        file, entry = place
        opened = self._opened(self._files[file])
        first, last = opened.rows("starts", entry, entry + 2).tolist()
        if not 0 <= first <= last <= opened.shapes["rows"][0][0]:
            raise ValueError(f"embeddings: {opened.path} is damaged (entry {entry} has rows {first} to {last})")
        return opened.rows("rows", first, last)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # open files cannot be pickled; each process maps them itself

    def missing(self, captions: Iterable[str]) -> list[str]:
        """Those captions that the store does not have, normalized and without repeats."""
        return [caption for caption in dict.fromkeys(map(normalize_caption, captions)) if caption not in self]

    def add(self, captions: Sequence[str], embeddings: Sequence[Tensor]) -> None:
        """Writes a file with these captions and their embeddings ``[S_i, W]``.

        Raises:
            ValueError: an embedding of another shape.
        """
        wrong = [tuple(e.shape) for e in embeddings if e.ndim != 2 or e.shape[1] != self.info.width]
        if wrong or len(captions) != len(embeddings):
            raise ValueError(
                f"embeddings: got {len(embeddings)}, of them {wrong[:3]} of another shape, expected {len(captions)} of "
                f"[S_i, {self.info.width}]"
            )
        keys = b"".join(map(_key, captions))
        path = self.folder / f"embeddings-{hashlib.sha256(keys).hexdigest()[:16]}.safetensors"
        tensors = {
            "keys": torch.frombuffer(bytearray(keys), dtype=torch.uint8).reshape(-1, _KEY_BYTES),
            "starts": torch.tensor([0, *np.cumsum([len(e) for e in embeddings])]),
            "rows": torch.cat([e.to(_DTYPES[self.info.precision]) for e in embeddings]),
        }
        with atomic_path(path) as temporary:
            write_tensors(temporary, tensors, {})
        self._add_files([path])

    def _find(self, caption: str) -> tuple[int, int] | None:
        """Index of the file in ``_files`` and of the entry in that file; ``None`` for a caption that is not stored."""
        key = np.array(_key(caption), self._keys.dtype)
        i = int(np.searchsorted(self._keys, key))
        if i == len(self._keys) or self._keys[i] != key:
            return None
        file, entry = self._places[i].tolist()
        return file, entry

    def _add_files(self, paths: Sequence[Path]) -> None:
        """Adds files to the lookup table."""
        keys, places = [self._keys], [self._places]
        for path in paths:
            new = self._opened(path).read("keys").numpy().view(self._keys.dtype)[:, 0]
            keys.append(new)
            places.append(np.stack((np.full(len(new), len(self._files)), np.arange(len(new))), axis=1))
            self._files.append(path)
        # Of a caption that is in several files, the first file's entry is used.
        self._keys, first = np.unique(np.concatenate(keys), return_index=True)
        self._places = np.concatenate(places)[first]

    def _opened(self, path: Path) -> TensorFile:
        """The file, mapped into memory and opened once.

        Raises:
            ValueError: it is damaged, or holds something else than this store's embeddings.
        """
        if path not in self._open:
            try:
                opened = TensorFile(path)
            except (ValueError, OSError) as error:
                raise ValueError(f"embeddings: {path} is damaged ({error}); delete it and embed again") from None
            sizes = {name: shape for name, (shape, _) in opened.shapes.items()}
            if set(sizes) != {"keys", "starts", "rows"}:
                raise ValueError(f"embeddings: {path} has tensors {sorted(sizes)}, expected keys, starts, rows")
            count, rows = (sizes[name][0] if sizes[name] else 0 for name in ("keys", "rows"))
            expected = {
                "keys": ((count, _KEY_BYTES), torch.uint8),
                "starts": ((count + 1,), torch.int64),
                "rows": ((rows, self.info.width), _DTYPES[self.info.precision]),
            }
            if opened.shapes != expected:
                raise ValueError(f"embeddings: {path} has {dict(opened.shapes)}, expected {expected}")
            self._open[path] = opened
        return self._open[path]


def embed_captions(
    encoder: TextEncoder,
    store: EmbeddingStore,
    captions: Iterable[str],
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Encodes the captions that the store does not have yet and adds them to it; returns their number.

    When it is interrupted or fails, everything encoded so far is stored, and the same call later continues from there.

    Args:
        encoder: one with the store's ``info``.
        store: the store to extend.
        captions: in any order, with or without repeats.
        batch: captions that are encoded together, >= 1.
        progress: called after every batch with the number of captions done and the number of all.
    """
    # Sorted, so that batches need little padding; the longest first, so that a lack of memory shows in the first batch.
    waiting = sorted(store.missing(captions), key=len, reverse=True)
    pending: dict[str, Tensor] = {}

    def write() -> None:
        if pending:
            store.add(list(pending), list(pending.values()))
            pending.clear()

    try:
        for first in range(0, len(waiting), batch):
            chunk = waiting[first : first + batch]
            pending.update(zip(chunk, encoder(chunk)))
            if sum(e.nbytes for e in pending.values()) >= SHARD_BYTES:
                write()
            if progress is not None:
                progress(first + len(chunk), len(waiting))
    finally:
        write()
    return len(waiting)


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 text file that are not blank.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no prompts in it, or not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts: {path} is not a file")
    prompts = [line.strip() for _, line in numbered_lines(path, MAX_PROMPT_BYTES)]
    if not prompts:
        raise ValueError(f"prompts: {path} has no lines, expected one prompt a line")
    return prompts


def _key(caption: str) -> bytes:
    return hashlib.sha256(normalize_caption(caption).encode()).digest()[:_KEY_BYTES]


def _read_index(folder: Path) -> EmbeddingInfo:
    """Reads a store's ``index.json``; errors as :class:`EmbeddingStore`."""
    path = folder / "index.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"embeddings: no index.json in {folder}, expected a folder that `hpdm data embed` wrote"
        )
    try:
        values = read_json(path, _Index)
        version = values.pop("format")
        if version > FORMAT:
            raise ValueError(f"{path}: format {version}, from a newer version, expected at most {FORMAT}")
        info: EmbeddingInfo = checked(values, EmbeddingInfo, f"{path}")
    except ValueError as error:
        raise ValueError(f"embeddings: {error}") from None
    return info
