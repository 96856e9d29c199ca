"""``hpdm data embed``: computes the text embeddings of a set's captions, or of prompts, once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from hpdm.checks import at_least
from hpdm.data.finding import survey
from hpdm.data.summary import log_summary
from hpdm.distributed import pick_device
from hpdm.files import check_not_a_file
from hpdm.lock import FolderLock
from hpdm.text import MAX_LENGTH, EmbeddingStore, Precision, TextEncoder, embed_captions, read_prompts


@dataclass(frozen=True)
class Embed:
    """Compute the text embeddings of a set's captions, once, for training and sampling."""

    encoder: str
    """T5 model: its folder, or its name on the hub, found in the local cache unless --download is given."""
    out: Path
    """Folder of the embeddings; captions that it already has are skipped."""
    data: Path | None = None
    """Folder of videos, or shards, with captions."""
    prompts: Path | None = None
    """Text file with one prompt per line, instead of --data or in addition to it."""
    max_length: int = MAX_LENGTH
    """Longest caption in tokens; longer ones are cut, with a warning."""
    batch: int = 32
    """Captions encoded at a time."""
    device: str = "auto"
    """"auto" takes CUDA when there is one."""
    precision: Precision = "fp32"
    """Precision of the encoder and of the embeddings: fp32, or bf16 for half the space."""
    download: bool = False
    """Download an encoder that is not in the local cache."""

    def __post_init__(self) -> None:
        if self.data is None and self.prompts is None:
            raise ValueError("data: got neither --data nor --prompts, expected one of them or both")
        at_least(self, 1, "max_length", "batch")

    def run(self) -> int:
        """Encodes the captions and returns the exit status."""
        captions = read_prompts(self.prompts) if self.prompts is not None else []
        if self.data is not None:
            found = survey(self.data, captions=True)
            log_summary(self.data, found)
            captions += [clip.caption for clip in found.files if clip.caption]
            if not captions:
                raise ValueError(f"data: {self.data} has no captions")
        encoder = TextEncoder(
            self.encoder,
            max_length=self.max_length,
            device=pick_device(self.device),
            precision=self.precision,
            download=self.download,
        )
        check_not_a_file("out", self.out)
        with FolderLock(self.out, "out", "hpdm data embed"):
            store = EmbeddingStore.create(self.out, encoder.info)
            with tqdm(total=len(store.missing(captions)), unit="caption", dynamic_ncols=True) as bar:
                new = embed_captions(encoder, store, captions, self.batch, lambda done, _: bar.update(done - bar.n))
        print(f"{self.out}: {len(store)} captions of width {encoder.info.width} ({encoder.info.encoder}), {new} new")
        return 0
