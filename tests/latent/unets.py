"""Small U-Nets for tests."""

import torch

from hpdm.latent.unet import FactorizedUNet
from hpdm.latent.unet_config import UNetConfig


def unet_config(**changes):
    """Two levels of 16 and 32 channels, on clips of 4x4x4 latents."""
    values = {
        "latent": (4, 4, 4), "channels": 3, "width": 16, "multipliers": (1, 2), "blocks": 1, "attention": (1, 2),
        "heads": 2, "groups": 4, "classes": 5, "text_width": 6,
    }  # fmt: skip
    return UNetConfig(**(values | changes))


def trained_unet(config, recompute="none", seed=0):
    """A network as after some training: no weight is zero."""
    torch.manual_seed(seed)
    model = FactorizedUNet(config, recompute=recompute).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def with_known(model, known):
    """The same network, and maps for known frames as they start."""
    more = FactorizedUNet(model.config.replace(known=known)).eval()
    found = more.load_state_dict(model.state_dict(), strict=False)
    assert found.unexpected_keys == []
    assert all(name.startswith(("known_mask.", "known_times.")) for name in found.missing_keys)
    return more
