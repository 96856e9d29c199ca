"""A perceptual distance between images from a TorchScript file, such as LPIPS (Zhang et al. 2018). None is downloaded.

The file is called as ``f(a, b)`` with float32 images ``[N, 3, H, W]`` in [-1, 1], as the public LPIPS package is, and
must return one distance per image, N numbers of any shape, through which gradients reach ``a``. To make such a file of
that package::

    network = lpips.LPIPS(net="vgg").eval()
    torch.jit.trace(network, (torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 64, 64))).save("lpips.pt")
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from hpdm.integrity import hash_of_file


class PerceptualNetwork:
    """A perceptual distance of videos, frame by frame, from a file.

    Args:
        path: a TorchScript file (``torch.jit.save``).
        device: where it runs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a TorchScript file.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"perceptual: {path} does not exist, expected a TorchScript file; none is downloaded"
            )
        self.path = path
        try:
            self._module = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"perceptual: {path} cannot be read as TorchScript ({reason})") from None
        for parameter in self._module.parameters():
            parameter.requires_grad_(False)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The mean distance of the frames of each clip, ``[B]``.

        Args:
            a, b: ``[B, 3, F, H, W]`` float in [-1, 1]; gradients flow to both.

        Raises:
            ValueError: the call fails, or returns something else than a distance per frame.
        """
        batch, _, frames, _, _ = a.shape
        images = [x.transpose(1, 2).flatten(0, 1).float() for x in (a, b)]
        try:
            out = self._module(*images)
        except (RuntimeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"perceptual: {self.path} failed on two tensors {list(images[0].shape)} in [-1, 1]: {reason}"
            ) from error
        if not isinstance(out, Tensor) or out.numel() != batch * frames or not out.is_floating_point():
            got = f"shape {list(out.shape)}, {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"perceptual: {self.path} returned {got}, expected {batch * frames} floating-point numbers"
            )
        return out.reshape(batch, frames).mean(1)


def checked_file(path: Path) -> str:
    """The hash of a file that can be read and called; raises as :class:`PerceptualNetwork`."""
    network = PerceptualNetwork(path)
    with torch.no_grad():
        network(torch.zeros(1, 3, 2, 64, 64), torch.zeros(1, 3, 2, 64, 64))
    return hash_of_file(path)


@lru_cache(maxsize=2)
def perceptual_network(path: str, sha256: str, device: torch.device) -> PerceptualNetwork:
    """The network of a file, read once per process.

    Raises:
        FileNotFoundError, ValueError: as :class:`PerceptualNetwork`; or a file with another hash.
    """
    network = PerceptualNetwork(Path(path), device)
    found = hash_of_file(Path(path))
    if found != sha256:
        raise ValueError(f"perceptual: {path} has the hash {found}, expected {sha256} as in the run's config")
    return network
