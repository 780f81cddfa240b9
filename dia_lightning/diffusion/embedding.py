"""E and G: p_θ's token embeddings as the space in which the diffusion runs."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


class TokenEmbedding(nn.Module):
    """The frozen embedding table E of p_θ, every row scaled to norm √d, and its inverse G.

    With rows of one norm the largest inner product is the nearest row, so G(E(x)) = x for every
    decodable token (with raw rows it is not: long rows win against the right ones).

    Attributes:
        weight: (V, d) float32, each row of norm √d; or raw rows, all scaled by one factor to a root
            mean square norm of √d. It is p_θ's, so no checkpoint repeats it.
        half_square: (V,) float32, ‖E(v)‖²/2 of raw rows; None for rows of one norm, of which it
            says nothing.
        decodable: (V,) bool, False for rows that are exact copies of an earlier row and for rows
            without direction (norm 0, or ids beyond the tokenizer), which no decoding may return.
        unit: p_θ's table is about unit · E, and exactly so for raw rows.
    """

    weight: Tensor
    half_square: Tensor | None
    decodable: Tensor

    def __init__(self, table: Tensor, n_tokens: int | None = None, normalise: bool = True) -> None:
        """`table` (V, d): raw embeddings; `n_tokens`: ids from here on are padding of the table;
        `normalise`: scale each row to norm √d; without it rows keep their own norms, as in the
        original proposal, kept for the ablation.
        """
        super().__init__()
        table = table.detach().float()
        # Of the raw table in bf16: scaled rows differ in their last bits from machine to machine.
        raw = table.bfloat16().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        self._fingerprint = hashlib.sha256(raw).hexdigest()[:16]
        norm, root_d = table.norm(dim=1, keepdim=True), table.shape[1] ** 0.5
        self.normalise = normalise
        self.unit = (
            float(norm.mean() if normalise else norm[:n_tokens].square().mean().sqrt()) / root_d
        )
        weight = table / norm.clamp_min(1e-12) * root_d if normalise else table / self.unit
        _, group = torch.unique(weight, dim=0, return_inverse=True)
        first = torch.full((int(group.max()) + 1,), len(group), device=group.device)
        first.scatter_reduce_(0, group, torch.arange(len(group), device=group.device), "amin")
        ids = torch.arange(len(group), device=group.device)
        known = ids < (len(group) if n_tokens is None else n_tokens)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer(
            "half_square", None if normalise else weight.square().sum(1) / 2, persistent=False
        )
        self.register_buffer(
            "decodable", (first[group] == ids) & (norm[:, 0] > 1e-8) & known, persistent=False
        )

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        return self.weight.shape[1]

    def forward(self, tokens: Tensor) -> Tensor:
        """E(x): (B, T) int64 → (B, T, d)."""
        return self.weight[tokens]

    def decode(self, z: Tensor) -> Tensor:
        """G(z)_i = argmax_v ⟨E(v), z_i⟩ over decodable tokens: (B, T, d) → (B, T) int64."""
        return (z @ self.weight.T).masked_fill(~self.decodable, -torch.inf).argmax(-1)

    def expected(self, logits: Tensor) -> Tensor:
        """Score interpolation, ẑ_0 = Σ_v softmax(logits)_v E(v) (CDCD, arXiv:2211.15089, eq. 5):
        (…, V) → (…, d).
        """
        return logits.float().softmax(-1) @ self.weight

    def fingerprint(self) -> str:
        """16 hex digits that tell this table from any other; a network trained on it refuses
        another.
        """
        return self._fingerprint
