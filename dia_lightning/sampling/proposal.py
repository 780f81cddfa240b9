"""The denoiser as the proposal of denoise-and-accept."""

from __future__ import annotations

import torch
from torch import Tensor

from dia_lightning.diffusion.denoiser import DenoiserNetwork


class DenoiserProposal:
    """A denoiser as `Proposal`: logits (B, T, V) at (z, t), or with `at` of the positions asked for only."""

    def __init__(self, network: DenoiserNetwork) -> None:
        self.network = network

    @torch.no_grad()
    def at(self, z: Tensor, t: Tensor, index: Tensor) -> Tensor:
        """Logits (B, K, V) float32 at positions `index` (B, K)."""
        hidden, query = self.network.hidden(z, t)
        rows = (x.gather(1, index[..., None].expand(-1, -1, x.shape[-1])) for x in (hidden, query))
        return self.network.readout(*rows)

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        return self.at(z, t, torch.arange(z.shape[1], device=z.device).expand(z.shape[:2]))
