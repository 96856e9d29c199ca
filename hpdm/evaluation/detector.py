"""Feature detectors in TorchScript files: the networks behind FVD and the Inception score. Nothing is downloaded.

Detectors are called as StyleGAN-V's evaluation calls its exports (``src/metrics`` of its public code), which HPDM's
authors use too: the detector gets a batch of videos as uint8 ``[B, 3, F, H, W]``, RGB in 0..255 at their own
resolution, on its device, under ``torch.no_grad``, and rescales and resizes them itself.

==========  =============================================  ===============================================
kind        call                                           must return, floating point
==========  =============================================  ===============================================
features    ``f(video, rescale=True, resize=True,          ``[B, W]``: logits of I3D trained on Kinetics-400
            return_features=True)``                        (W = 400), for FVD
classes     ``f(video)``                                   ``[B, K]``: probabilities (after softmax) of C3D
                                                           trained on UCF-101 (K = 101), for the Inception score
==========  =============================================  ===============================================
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["features", "classes"]

_ARGUMENTS: dict[Kind, dict[str, bool]] = {
    "features": {"rescale": True, "resize": True, "return_features": True},
    "classes": {},
}


class Detector:
    """A detector from a file.

    Args:
        path: a TorchScript file (``torch.jit.save``).
        kind: ``"features"`` or ``"classes"``, see above.
        device: where it runs.

    Attributes:
        sha256: of the file.
        width: columns of its output, 0 before the first call.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a TorchScript file.
    """

    def __init__(self, path: Path, kind: Kind, device: torch.device | str = "cpu") -> None:
        if not path.is_file():
            raise FileNotFoundError(f"detector: {path} does not exist, expected a TorchScript file; none is downloaded")
        self.path, self.kind, self.device, self.width = path, kind, torch.device(device), 0
        with path.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            self._module = torch.jit.load(str(path), map_location=self.device).eval()
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"detector: {path} cannot be read as TorchScript ({reason})") from None

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """Features or probabilities ``[B, W]``, float32 on the CPU.

        Args:
            videos: uint8 ``[B, 3, F, H, W]``.

        Raises:
            ValueError: the call of its kind fails, or returns something else than its kind must.
        """
        arguments = _ARGUMENTS[self.kind]
        try:
            out = self._module(videos.to(self.device), **arguments)
        except (RuntimeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            call = ", ".join(["video", *(f"{name}={value}" for name, value in arguments.items())])
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"detector: {self.path} failed on uint8 {list(videos.shape)} when called as f({call}): {reason}"
            ) from error
        self._check(out, len(videos))
        return out.float().cpu()

    def _check(self, out: object, batch: int) -> None:
        """Raises ValueError unless ``out`` is what the table above says; remembers its width."""
        what = f"detector: {self.path} returned"
        columns = str(self.width) if self.width else {"features": "W", "classes": "K"}[self.kind]
        expected = f"expected a floating-point tensor [{batch}, {columns}]"
        if not isinstance(out, Tensor):
            raise ValueError(f"{what} {type(out).__name__}, {expected}")
        if out.ndim != 2 or len(out) != batch or out.shape[1] != (self.width or out.shape[1]) or not out.shape[1]:
            raise ValueError(f"{what} shape {list(out.shape)}, {expected}")
        if not out.is_floating_point():
            raise ValueError(f"{what} {out.dtype}, {expected}")
        if not out.isfinite().all():
            raise ValueError(f"{what} NaN or infinity, {expected} of finite values")
        if self.kind == "classes" and (out.min() < 0 or (out.float().sum(1) - 1).abs().max() > 1e-3):
            raise ValueError(
                f"{what} rows from {out.min():.3g} with sums up to {out.float().sum(1).max():.3g}, {expected} of "
                "probabilities: rows without negative values that sum to 1"
            )
        self.width = out.shape[1]
