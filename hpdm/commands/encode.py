"""``hpdm data encode``: encodes the clips of a set with an autoencoder, once, for training on their latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tqdm import tqdm

from hpdm import distributed
from hpdm.checks import at_least
from hpdm.commands.autoencoder import load_autoencoder
from hpdm.commands.common import only_writer
from hpdm.data.clips import VideoDataset
from hpdm.data.decode import Decoder
from hpdm.data.latent_store import LatentStore
from hpdm.data.layout import Split
from hpdm.data.summary import log_summary
from hpdm.latent.autoencoder import VideoAutoencoder
from hpdm.latent.coding import CHUNK
from hpdm.latent.encoding import describe, encode_clips


@dataclass(frozen=True)
class Encode:
    """Encode the clips of a set with an autoencoder, once, for training on their latents. Works under torchrun."""

    data: Path
    """Folder of videos or images, or shards."""
    autoencoder: Path
    """Run of the autoencoder, or a file that `hpdm export` wrote of one."""
    out: Path
    """Folder of the latents; clips that it already has are skipped."""
    size: tuple[int, int] | None = None
    """Height and width to which clips are resized and cropped, those of the training; the autoencoder's if not
    given."""
    stride: int = 1
    """Step between frames, that of the training."""
    fps: float | None = None
    """Frame rate to which clips are resampled before --stride counts; each clip's own if not given."""
    split: Split | None = None
    """Encode only one side of UCF-101's official split."""
    chunk: int = CHUNK
    """Latents along time that are encoded at once; more are faster, take more memory and are the same but for
    rounding."""
    decoder: Decoder = "auto"
    """What decodes videos, as in `hpdm train`."""
    device: str = "auto"
    """"auto" takes CUDA when there is one."""

    def __post_init__(self) -> None:
        at_least(self, 1, "chunk")

    def run(self) -> int:
        """Encodes the clips; the exit status is 1 when a clip was left out as damaged. A collective."""
        device = distributed.pick_device(self.device)
        with distributed.process_group(device) as device, only_writer(self.out, "hpdm data encode"):
            with distributed.raise_on_all_ranks():
                model = cast(VideoAutoencoder, load_autoencoder(self.autoencoder, device).model)
                clips = VideoDataset(
                    self.data, frames=1, size=self.size or model.config.resolution[1:], stride=self.stride,
                    fps=self.fps, split=self.split, decoder=self.decoder,
                )  # fmt: skip
                info = describe(model, clips)
            distributed.assert_same_on_all_ranks("latents", info)
            missing: list[int] = []
            with distributed.raise_on_all_ranks():
                if distributed.is_first():
                    log_summary(self.data, clips.found)
                    missing = LatentStore.create(self.out, info).missing()
            missing = distributed.broadcast(missing)  # other ranks may write before this one looks
            numbers = distributed.shard(missing)
            with distributed.raise_on_all_ranks():
                store = LatentStore(self.out)
            bar = tqdm(total=len(numbers), unit="clip", dynamic_ncols=True, disable=not distributed.is_first())
            with distributed.raise_on_all_ranks(), bar:
                encode_clips(model, clips, store, numbers, self.chunk, lambda done: bar.update(done - bar.n))
            store = LatentStore(self.out)  # with what the other ranks wrote
            left_out = int((store.frames == 0).sum())
            if distributed.is_first():
                size = sum(path.stat().st_size for path in self.out.glob("latents-*"))
                print(
                    f"{self.out}: {store.count} latents of {len(store)} clips, {len(missing)} of them new, "
                    f"{size / 1e6:.1f} MB" + (f"; {left_out} clips left out, which cannot be read" if left_out else "")
                )
        return 1 if left_out else 0
