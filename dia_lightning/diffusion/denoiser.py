"""The network of the denoiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dia_lightning.diffusion.adapted import FrozenLinear, make_trunk
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.infiller import InfillerTrunk
from dia_lightning.diffusion.schedule import Schedule
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.errors import UserError
from dia_lightning.meter import weights_of


class DenoiserNetwork(nn.Module):
    """ε_ψ by way of logits over the vocabulary (see science.md, "Denoiser").

    logits_i = head(hidden_i) + (α/σ²) ⟨z_i, E⟩. The second term is the exact log-likelihood of z_i
    for each token (all rows have one norm; of raw ones (α²/2σ²) ‖E‖² is taken off), so the network
    learns only what the other positions say
    about token i: p(x_i | z) ∝ N(z_i; α E(x_i), σ²) p(x_i | z_{−i}).

    Args:
        embedding, schedule: E and the noise; frozen.
        size: of the transformer.
        tied_head: read out by ⟨W hidden, E⟩ instead of by a matrix of its own (V × width more
            parameters).
        n_labels: labels 1 … n_labels that texts may carry (see `labels.Labeller`), 0 standing for
            no label; 0 = none at all. Their embeddings begin at zero, where a labelled network is
            the unlabelled one.
        model: p_θ, where `size` adapts its blocks or has it read the left; its output embedding is
            then the head.

    Raises:
        UserError: if `size` does not fit the model (see `adapted`, `infiller`), or goes with a tied
            head.
    """

    def __init__(
        self, embedding: TokenEmbedding, schedule: Schedule, size: NetworkSize,
        tied_head: bool = False, n_labels: int = 0, model: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embedding, self.schedule, self.size, self.tied_head = (
            embedding,
            schedule,
            size,
            tied_head,
        )
        infills = size.trunk == "infiller"
        self.trunk = (
            InfillerTrunk(embedding, size, model)
            if infills
            else make_trunk(embedding.dim, size, model)
        )
        self.labels = (
            nn.Embedding(n_labels + 1, size.width, _weight=torch.zeros(n_labels + 1, size.width))
            if n_labels
            else None
        )
        if size.needs_lm:
            if tied_head:
                reason = "trunk: infiller" if infills else "adapter_rank"
                raise UserError(
                    f"tied_head: true given, allowed: false; with {reason} the head is that of"
                    " base_lm"
                )
            self.head: nn.Linear = FrozenLinear(model.get_output_embeddings())
            return
        self.head = nn.Linear(size.width, embedding.dim if tied_head else embedding.vocab_size)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    network_name = "denoiser"

    def multiplied(self) -> list[tuple[nn.Module, int]]:
        """What a `cost.Meter` watches; every read-out is a product with the embedding table too."""
        return [
            (self.trunk, weights_of(self.trunk)),
            (self.head, weights_of(self.head) + self.embedding.weight.numel()),
        ]

    def hidden(
        self, z: Tensor, t: Tensor, z0_prev: Tensor | None = None, label: Tensor | None = None,
        left: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What `readout` needs: hidden (B, T, width) and query (B, T, d) = (α/σ²) z, for raw rows
        (B, T, d + 1) with α²/σ². `left` (B, T): for an infiller, see `InfillerTrunk.forward`.

        The state before a position reads it out, as in p_θ, so that p_θ's own weights are a
        sensible start (the shift of DiffuGPT, Gong et al., arXiv:2410.17891).
        """
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        condition = None
        if self.labels is not None:
            rows = self.labels(
                torch.zeros_like(z[:, 0, 0], dtype=torch.int64) if label is None else label
            )
            # Begun at zero, rows of this size would take Adam three times the steps to learn as
            # much.
            condition = rows * self.size.width**0.5
        known = () if left is None else (left,)
        hidden = self.trunk(z, t, alpha, z0_prev, condition, *known)[:, :-1]
        ratio = (alpha / sigma.square().clamp_min(1e-2))[..., None]
        query = ratio * z
        return hidden, (
            query if self.embedding.normalise else torch.cat([query, alpha[..., None] * ratio], -1)
        )

    def readout(self, hidden: Tensor, query: Tensor) -> Tensor:
        """Logits (…, V) float32 from rows of `hidden` and `query`."""
        weight, half_square = self.embedding.weight, self.embedding.half_square
        out = self.head(hidden)
        if half_square is not None or self.size.needs_lm:
            out = out.to(weight.dtype) @ weight.T if self.tied_head else out
            # In bf16 the difference of two large numbers would say nothing of the token.
            with torch.autocast(query.device.type, enabled=False):
                query = query.float()
                if half_square is None:
                    return out.float() + query @ weight.T
                return out.float() + query[..., :-1] @ weight.T - query[..., -1:] * half_square
        if self.tied_head:
            return ((out.to(weight.dtype) + query) @ weight.T).float()
        return out.float() + (query @ weight.T).float()

    def forward(
        self, z: Tensor, t: Tensor, z0_prev: Tensor | None = None, label: Tensor | None = None
    ) -> Tensor:
        """Z (B, T, d), t (B, T), z0_prev (B, T, d) or None, label (B,) int64 or None (0) →
        logits (B, T, V) float32.
        """
        return self.readout(*self.hidden(z, t, z0_prev, label))

    @torch.no_grad()
    def init_from_lm(self, model: Any, bos_id: int) -> None:
        """Start from p_θ's own weights, its output embedding included (needs `tied_head:
        false`).
        """
        if self.tied_head:
            raise UserError("init_from_lm: true given, allowed: with tied_head false")
        self.trunk.init_from_lm(model, bos_id, self.embedding.unit)
        if self.size.needs_lm:
            return
        self.head.weight.copy_(model.get_output_embeddings().weight)  # type: ignore[operator]
