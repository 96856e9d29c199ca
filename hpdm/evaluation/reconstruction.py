"""How well an autoencoder reconstructs clips, beside what its grid of latents could hold without a network.

PSNR is that of a clip, ``10 log10(2^2 / mean squared error)`` of pixels in [-1, 1], averaged over clips. For it
reconstructions are clamped to [-1, 1] and not rounded. The baseline averages blocks of pixels, as many as a latent
stands for, and interpolates between the averages (trilinear): a grid of the same size with one number per color.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from hpdm import distributed
from hpdm.checks import Triple
from hpdm.data.clips import VideoDataset
from hpdm.psnr import psnr
from hpdm.runs import Run
from hpdm.training.batches import collate


@torch.no_grad()
def evaluate_reconstruction(
    run: Run,
    dataset: VideoDataset,
    *,
    clips: int,
    batch: int,
    chunk: int | None = None,
    tile: tuple[int, int] | None = None,
    overlap: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Reconstructs clips spread evenly over a set, of any size and length. A collective: ranks share the clips.

    Args:
        run: with an autoencoder.
        dataset: the clips.
        clips: number of clips; all of the set if it has fewer.
        batch: clips at a time.
        chunk: latents along time that are coded at once; ``None`` for all.
        tile, overlap: of tiles along height and width in latents, as of :func:`hpdm.latent.coding.encode`.
        progress: show a progress bar.

    Returns:
        ``clips``, ``frames``, ``chunk``, ``tile`` and ``overlap``; ``psnr``, of ``model`` and ``baseline`` each ``all``
        frames, those at ``borders`` of chunks and those ``inside`` (``None`` where there are no such frames), and
        ``frame``, a list with the PSNR of every frame. The same on all ranks.

    Raises:
        ValueError: the run has no autoencoder, it cannot code in chunks, or a tile or overlap is out of range.
    """
    factors = run.system.compression(run.config)
    count = min(clips, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    starts = list(distributed.shard(range(0, count, batch)))
    found: dict[int, Tensor] = {}  # by number of the first clip
    for first in tqdm(starts, unit="batch", dynamic_ncols=True, disable=not (progress and distributed.is_first())):
        items = [dataset[i] for i in chosen[first : first + batch]]
        video = collate(items)["video"].to(run.device)
        x = video.float() / 127.5 - 1
        outs = (run.system.reconstruct(run.model, video, chunk, tile, overlap), pooled(x, factors))
        found[first] = torch.stack([(out - x).double().square().mean((1, 3, 4)) for out in outs], dim=1).cpu()
    errors = torch.cat(distributed.gather(found))  # [clips, 2, F]
    borders = chunk_borders(errors.shape[2], factors[0], chunk)
    scores = {}
    for name, error in zip(("model", "baseline"), errors.unbind(1)):
        scores[name] = {
            "all": _psnr(error), "borders": _psnr(error[:, borders]), "inside": _psnr(error[:, ~borders]),
            "frame": [_psnr(error[:, f : f + 1]) for f in range(error.shape[1])],
        }  # fmt: skip
    coded = {"chunk": chunk, "tile": None if tile is None else list(tile), "overlap": overlap}
    return {"clips": count, "frames": errors.shape[2], **coded, "psnr": scores}


def pooled(x: Tensor, factors: Triple) -> Tensor:
    """Clips averaged over blocks and interpolated back (trilinear, block centers at the averages).

    Args:
        x: ``[B, C, F, H, W]`` float.
        factors: frames, height, width of a block. Sizes that are no multiples are padded by repeating the edge.
    """
    size = x.shape[2:]
    f, h, w = (-n % factor for n, factor in zip(size, factors))
    padded = F.pad(x, (0, w, 0, h, 0, f), mode="replicate")
    average = F.avg_pool3d(padded, factors)
    out = F.interpolate(average, size=padded.shape[2:], mode="trilinear", align_corners=False)
    return out[:, :, : size[0], : size[1], : size[2]]


def chunk_borders(frames: int, factor: int, chunk: int | None) -> Tensor:
    """Which frames are the last of a chunk or the first of the next: bool ``[frames]``."""
    at_border = torch.zeros(frames, dtype=torch.bool)
    if chunk is not None:
        for border in range(chunk * factor, frames, chunk * factor):
            at_border[border - 1 : border + 1] = True
    return at_border


def _psnr(error: Tensor) -> float | None:
    """Mean PSNR of clips whose frames have the mean squared errors ``[B, F]``; ``None`` without frames."""
    if not error.shape[1]:
        return None
    return float(psnr(error.mean(1)).mean())


def reconstruction_table(result: dict[str, Any]) -> str:
    """Rows of the model and the baseline, columns of frames; "-" where there are none."""
    lines = [f"{'PSNR [dB]':<24}{'all':>10}{'borders':>10}{'inside':>10}{'worst frame':>14}"]
    for name, title in (("model", "reconstruction"), ("baseline", "pooling, trilinear")):
        scores = result["psnr"][name]
        cells = ("-" if scores[part] is None else f"{scores[part]:.2f}" for part in ("all", "borders", "inside"))
        lines.append(f"{title:<24}" + "".join(f"{cell:>10}" for cell in cells) + f"{min(scores['frame']):>14.2f}")
    return "\n".join(lines)
