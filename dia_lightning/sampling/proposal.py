"""The denoiser as the proposal of denoise-and-accept."""

from __future__ import annotations

import torch
from torch import Tensor

from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.lm import rows_at_once
from dia_lightning.sampling.positions import gather


class DenoiserProposal:
    """A denoiser as `Proposal`: logits (B, T, V) at (z, t), or with `at` of the positions asked for only."""

    def __init__(self, network: DenoiserNetwork) -> None:
        self.network = network

    @torch.no_grad()
    def at(self, z: Tensor, t: Tensor, index: Tensor) -> Tensor:
        """Logits (B, K, V) float32 at positions `index` (B, K)."""
        rows = rows_at_once(z)
        chunks = zip(z.split(rows), t.split(rows), index.split(rows), strict=True)
        return torch.cat([self._at(*chunk) for chunk in chunks])

    def _at(self, z: Tensor, t: Tensor, index: Tensor) -> Tensor:
        return self.network.readout(*(gather(x, index) for x in self.network.hidden(z, t)))

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        return self.at(z, t, torch.arange(z.shape[1], device=z.device).expand(z.shape[:2]))
