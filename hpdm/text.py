"""Captions as tensors: a frozen T5 encoder, its embeddings kept on disk, batches of them with a mask.

The paper's text-to-video models are conditioned on embeddings of T5-11B (Table 8), which are the same in every step:
``hpdm data embed`` computes them once, :class:`EmbeddingStore` keeps them, :func:`collate_text` makes batches for
:class:`hpdm.patch.model.HPDM`. An empty caption is no text at all, which is what conditioning dropout trains.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hpdm.files import atomic_path, write_text
from hpdm.patch.config import check_choice

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
MAX_LENGTH = 128
"""Tokens of a caption; longer ones are cut."""
FORMAT = 1
SHARD_BYTES = 256 * 2**20
"""Embeddings that are in memory before they go to a file."""
_KEY_BYTES = 16  # of a caption's SHA-256: among 10^8 captions two agree with probability 10^-23
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EmbeddingInfo:
    """What makes embeddings comparable."""

    encoder: str
    """Name of the encoder, the last part of its folder or hub name."""
    width: int
    max_length: int
    precision: str


def normalised(caption: str) -> str:
    """The caption that is encoded and looked up: white space is one space, none at the ends, as T5 reads it."""
    return " ".join(caption.split())


class TextEncoder:
    """A frozen T5 encoder, or another text encoder of ``transformers`` (mT5, UMT5).

    Args:
        name: local folder with the model and its tokenizer, or a name on the hub.
        max_length: tokens of a caption, >= 1; longer captions are cut, with a warning.
        device: where it runs.
        precision: ``"fp32"`` or ``"bf16"``, of weights and embeddings. T5 overflows in fp16.
        download: fetch what is not in the local cache.

    Raises:
        ImportError: ``transformers`` is not installed.
        OSError: no such model, or none here where ``download`` is off.
        ValueError: an argument out of range, no tokenizer, or a model that is no text encoder.
    """

    def __init__(
        self,
        name: str | Path,
        *,
        max_length: int = MAX_LENGTH,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        download: bool = False,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length: got {max_length}, expected at least 1")
        check_choice("precision", precision, Precision)
        try:
            from transformers import AutoModelForTextEncoding, AutoTokenizer  # deferred: seconds to import
        except ImportError as error:
            raise ImportError("text encoder: needs transformers; install hpdm[t2v]") from error
        self.device, here = torch.device(device), {"local_files_only": not download}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(name), **here)
            model = AutoModelForTextEncoding.from_pretrained(str(name), dtype=_DTYPES[precision], **here)
        except (OSError, ValueError) as error:
            wanted = "the folder of a T5 model and its tokenizer, or its name on the hub"
            note = "" if download else "; one that is not in the local cache yet needs --download"
            reason = str(error).splitlines()[0]
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"encoder: got {str(name)!r}, expected {wanted}{note} ({reason})") from error
        # Without its files transformers makes up a tokenizer that knows the space and nothing else.
        if len(self.tokenizer) - len(self.tokenizer.all_special_ids) <= 1:
            raise ValueError(f"encoder: got {str(name)!r}, which has no tokenizer beside the model")
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.info = EmbeddingInfo(Path(name).name, int(model.config.hidden_size), max_length, precision)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Embeddings of the captions, each ``[S_i, W]`` on the CPU without padding; no rows for an empty caption."""
        texts = [normalised(caption) for caption in captions]
        given = [text for text in texts if text]
        encoded = iter(self._encode(given) if given else [])
        nothing = torch.empty(0, self.info.width, dtype=_DTYPES[self.info.precision])
        return [next(encoded) if text else nothing for text in texts]

    def _encode(self, texts: list[str]) -> list[Tensor]:
        limit = self.info.max_length
        lengths = [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
        too_long = [text for text, length in zip(texts, lengths) if length > limit]
        if too_long:
            logger.warning("%d captions cut to %d tokens, the first: %.80s...", len(too_long), limit, too_long[0])
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        mask = batch["attention_mask"].to(self.device)
        states = self.model(input_ids=batch["input_ids"].to(self.device), attention_mask=mask).last_hidden_state
        return [row[visible].cpu() for row, visible in zip(states, mask.bool())]


def collate_text(texts: Sequence[Tensor], multiple: int = 16) -> tuple[Tensor, Tensor]:
    """Embeddings of several captions as one batch.

    Args:
        texts: per caption ``[S_i, W]``, any float dtype; ``S_i`` may be 0 for no text.
        multiple: the length is rounded up to a multiple of it: few shapes for compiled graphs and memory pools, and
            rows that fused attention can load aligned. The model's results do not depend on it.

    Returns:
        ``text [B, S, W]`` float32, zero behind each caption's end, and its mask ``[B, S]`` bool, on the CPU.

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
    """A folder of embeddings, found by their captions.

    ``index.json`` says what they are. Each ``embeddings-*.safetensors`` holds the embeddings one after another,
    ``rows [sum of S_i, W]``, where each begins, ``starts [n + 1]``, and ``keys [n, 16]``, hashes of the captions: sets
    in any layout share it, and repeated captions are there once. A file is whole or absent, and named by its captions,
    so that several processes may write into one folder. Reading maps the rows and holds 32 bytes a caption.

    Args:
        folder: what ``hpdm data embed`` wrote.
        width: that the embeddings must have, a model's ``config.text_width``; ``None`` for any.

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
        self._open: dict[Path, Any] = {}
        self._keys, self._places = np.empty(0, f"S{_KEY_BYTES}"), np.empty((0, 2), np.int64)
        self._take_in(sorted(self.folder.glob("embeddings-*.safetensors")))

    @classmethod
    def create(cls, folder: str | Path, info: EmbeddingInfo) -> EmbeddingStore:
        """The store in ``folder``, begun if there is none.

        Raises:
            ValueError: the folder holds embeddings of another kind.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
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
            ValueError: the caption is not there.
        """
        found = self._find(caption)
        if found is None:
            raise ValueError(
                f"caption: {caption!r} is not in {self.folder}; run `hpdm data embed` with --data or --prompts first"
            )
        file, entry = found
        opened = self._opened(self._files[file])
        first, last = opened.get_slice("starts")[entry : entry + 2].tolist()
        return opened.get_slice("rows")[first:last]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # every reader maps the files for itself

    def missing(self, captions: Iterable[str]) -> list[str]:
        """Those captions that are not there, normalised, each once."""
        return [caption for caption in dict.fromkeys(map(normalised, captions)) if caption not in self]

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
            save_file(tensors, temporary)
        self._take_in([path])

    def _find(self, caption: str) -> tuple[int, int] | None:
        """Number of the file and of the entry in it."""
        key = np.array(_key(caption), self._keys.dtype)
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            return None
        file, entry = self._places[at].tolist()
        return file, entry

    def _take_in(self, paths: Sequence[Path]) -> None:
        keys, places = [self._keys], [self._places]
        for path in paths:
            found = self._opened(path).get_tensor("keys").numpy().view(self._keys.dtype)[:, 0]
            keys.append(found)
            places.append(np.stack((np.full(len(found), len(self._files)), np.arange(len(found))), axis=1))
            self._files.append(path)
        # The first of equal captions wins, as the files are ordered.
        self._keys, kept = np.unique(np.concatenate(keys), return_index=True)
        self._places = np.concatenate(places)[kept]

    def _opened(self, path: Path) -> Any:
        if path not in self._open:
            try:
                opened = safe_open(path, "pt").__enter__()
                whole = set(opened.keys()) == {"keys", "starts", "rows"}
            except (SafetensorError, OSError) as error:
                raise ValueError(f"embeddings: {path} is damaged ({error}); delete it and embed again") from None
            if not whole:
                raise ValueError(f"embeddings: {path} has tensors {opened.keys()}, expected keys, starts, rows")
            self._open[path] = opened
        return self._open[path]


def embed_captions(
    encoder: TextEncoder,
    store: EmbeddingStore,
    captions: Iterable[str],
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Adds the captions that the store does not have yet; returns how many these were.

    Whatever stops it, what was encoded until then is kept, and the same call goes on behind it.

    Args:
        encoder: of the store's kind.
        store: grows.
        captions: any order, any number of times.
        batch: captions that are encoded together, >= 1.
        progress: called as (done, all) after every batch.
    """
    # The longest first: batches of like lengths waste little on padding, and what does not fit in memory fails at once.
    waiting = sorted(store.missing(captions), key=len, reverse=True)
    pending: dict[str, Tensor] = {}

    def write() -> None:
        if pending:
            store.add(list(pending), list(pending.values()))
            pending.clear()

    try:
        for first in range(0, len(waiting), batch):
            some = waiting[first : first + batch]
            pending.update(zip(some, encoder(some)))
            if sum(e.nbytes for e in pending.values()) >= SHARD_BYTES:
                write()
            if progress is not None:
                progress(first + len(some), len(waiting))
    finally:
        write()
    return len(waiting)


def _key(caption: str) -> bytes:
    return hashlib.sha256(normalised(caption).encode()).digest()[:_KEY_BYTES]


def _read_index(folder: Path) -> EmbeddingInfo:
    path = folder / "index.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"embeddings: no index.json in {folder}, expected a folder that `hpdm data embed` wrote"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("format")
        if version > FORMAT:
            raise ValueError(f"format {version}, from a newer version, expected at most {FORMAT}")
        return EmbeddingInfo(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"embeddings: {path}: {error}") from None
