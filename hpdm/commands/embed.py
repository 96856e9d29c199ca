"""``hpdm data embed``: text embeddings of a set's captions, or of prompts, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from hpdm.data.clips import find_clips
from hpdm.distributed import pick_device
from hpdm.text import MAX_LENGTH, EmbeddingStore, Precision, TextEncoder, embed_captions


@dataclass(frozen=True)
class Embed:
    """Compute the text embeddings of a set's captions, once, for training and sampling."""

    encoder: str
    """T5 model: its folder, or its name on the hub, of which only the local cache is used without --download."""
    out: Path
    """Folder of the embeddings; captions that are there already are skipped."""
    data: Path | None = None
    """Set with captions: a folder of videos or shards."""
    prompts: Path | None = None
    """Text file with one prompt a line, instead of --data or beside it."""
    max_length: int = MAX_LENGTH
    """Tokens of a caption; longer ones are cut, with a warning."""
    batch: int = 32
    """Captions at a time."""
    device: str = "auto"
    """"auto" takes CUDA when there is one."""
    precision: Precision = "fp32"
    """Of the encoder and of what is kept: fp32, or bf16 for half the space."""
    download: bool = False
    """Fetch an encoder that is not here yet from the hub."""

    def __post_init__(self) -> None:
        if self.data is None and self.prompts is None:
            raise ValueError("data: got neither --data nor --prompts, expected one of them or both")
        for name in ("max_length", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")

    def run(self) -> int:
        """Encodes; returns the exit status."""
        captions = read_prompts(self.prompts) if self.prompts is not None else []
        if self.data is not None:
            captions += [clip.caption for clip in find_clips(self.data, captions=True)[1] if clip.caption]
            if not captions:
                raise ValueError(f"data: {self.data} has no captions")
        encoder = TextEncoder(
            self.encoder,
            max_length=self.max_length,
            device=pick_device(self.device),
            precision=self.precision,
            download=self.download,
        )
        store = EmbeddingStore.create(self.out, encoder.info)
        with tqdm(total=len(store.missing(captions)), unit="caption", dynamic_ncols=True) as bar:
            new = embed_captions(encoder, store, captions, self.batch, lambda done, _: bar.update(done - bar.n))
        print(f"{self.out}: {len(store)} captions of width {encoder.info.width} ({encoder.info.encoder}), {new} new")
        return 0


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no prompts in it, or not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts: {path} is not a file")
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not prompts:
        raise ValueError(f"prompts: {path} has no lines, expected one prompt a line")
    return prompts
