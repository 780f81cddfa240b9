"""h_φ(z_t, t): the value of a noised text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dia_lightning.diffusion.adapted import make_trunk
from dia_lightning.diffusion.schedule import Schedule
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.meter import weights_of


class CriticNetwork(nn.Module):
    """The denoiser's trunk with mean pooling and one output.

    The output is standardised, (value − mean) / scale, with buffers `mean` and `scale`: those of
    the rewards, or for `soft` the mean of λ r and 1, as log E[exp(λ r)] = c + log E[exp(λ r − c)]
    for any c but for no factor. `standardised` is what
    the loss sees, `forward` the value: E[r | z_t], or for `soft` log E[exp(λ r) | z_t].
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int, schedule: Schedule, size: NetworkSize, model: Any = None) -> None:
        super().__init__()
        self.schedule, self.size = schedule, size
        self.trunk = make_trunk(dim, size, model)
        self.trunk.z0_in.requires_grad_(False)  # a critic sees no earlier estimate
        self.head = nn.Sequential(
            nn.Linear(size.width, size.width), nn.SiLU(), nn.Linear(size.width, 1)
        )
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    network_name = "critic"

    def multiplied(self) -> list[tuple[nn.Module, int]]:
        """What a `cost.Meter` watches."""
        return [(part, weights_of(part)) for part in (self.trunk, self.head)]

    def standardised(self, z: Tensor, t: Tensor) -> Tensor:
        """Z (B, T, d), t (B, T) → (B,) float32."""
        hidden = self.trunk(z, t, self.schedule.alpha(t), None)
        out: Tensor = self.head(hidden.mean(1).to(self.head[0].weight.dtype))
        return out[:, 0].float()

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Z (B, T, d), t (B, T) → (B,) float32, in units of the reward, for `soft` of λ times
        the reward.
        """
        return self.mean + self.scale * self.standardised(z, t)
