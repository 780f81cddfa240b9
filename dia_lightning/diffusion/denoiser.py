"""The network of denoiser and critic: a transformer over noised embeddings with one noise time per token."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dia_lightning.cost import weights_of
from dia_lightning.diffusion.adapted import FrozenLinear, adapted_parts
from dia_lightning.diffusion.attention import attend
from dia_lightning.diffusion.schedule import Schedule
from dia_lightning.embedding import TokenEmbedding
from dia_lightning.resources import UserError


@dataclass
class NetworkSize:
    """Size of a transformer: `width`, `layers`, `heads`, longest text `max_length` in tokens, kind of positions.

    `adapter_rank` above 0: the blocks are p_θ's own, frozen, with adapters of that rank (see `adapted`).
    """

    width: int = 128
    layers: int = 6
    heads: int = 4
    max_length: int = 40
    rotary: bool = False
    adapter_rank: int = 0

    def __post_init__(self) -> None:
        for option in ("width", "layers", "heads", "max_length"):
            if getattr(self, option) < 1:
                raise UserError(f"--model.init_args.{option}: {getattr(self, option)} given, at least 1 allowed")
        if self.adapter_rank < 0:
            raise UserError(f"--model.init_args.adapter_rank: {self.adapter_rank} given, must be 0 (none) or more")
        if self.width % (2 * self.heads):
            raise UserError(f"--model.init_args.width: {self.width} given, must be a multiple of 2 × heads ({self.heads})")

    def as_dict(self) -> dict[str, int | bool]:
        return asdict(self)


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al., arXiv:2104.09864): x (B, H, T, D)."""
    half = x.shape[-1] // 2
    rate = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[2], device=x.device)[:, None] * rate
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    """GPT-2's block with attention in both directions, its norms shifted, scaled and gated by the noise time (AdaLN)."""

    def __init__(self, size: NetworkSize) -> None:
        super().__init__()
        width = size.width
        self.heads, self.rotary = size.heads, size.rotary
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        # AdaLN-single (PixArt-α, arXiv:2310.00426): one projection of the time for all blocks plus this table.
        self.table = nn.Parameter(torch.zeros(6, width))
        for layer in (self.qkv, self.out, self.up, self.down):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        for layer in (self.out, self.down):
            nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * size.layers))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """X (B, T, width), modulation (B, T, 6, width) → (B, T, width)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (modulation + self.table).unbind(2)
        q, k, v = self.qkv(self.norm_1(x) * (1 + scale_1) + shift_1).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        if self.rotary:
            q, k = _rotate(q), _rotate(k)
        attended = attend(q, k, v).transpose(1, 2).flatten(2)
        x = x + (1 + gate_1) * self.out(attended)
        hidden = F.gelu(self.up(self.norm_2(x) * (1 + scale_2) + shift_2), approximate="tanh")
        return x + (1 + gate_2) * self.down(hidden)


class Trunk(nn.Module):
    """Embeds noised tokens and their times and runs the blocks: the part that denoiser and critic have in common.

    A start position is put before the text, as p_θ has it. Inputs are α z, which fades with the noise, and the previous
    ẑ_0 (self-conditioning, Chen et al., arXiv:2208.04202).

    Attributes:
        checkpointed: keep of each block only what goes into it, and run it again in the backward pass (Chen et al.,
            arXiv:1604.06174): less memory for a third more time.
    """

    checkpointed = False

    def __init__(self, dim: int, size: NetworkSize, model: Any = None) -> None:
        """`dim`: of the embeddings; `model`: p_θ, where blocks are adapted."""
        super().__init__()
        self.size = size
        self.z_in = nn.Linear(dim, size.width)
        self.z0_in = nn.Linear(dim, size.width, bias=False)
        self.start = nn.Parameter(torch.zeros(size.width))
        # A trained parameter must have a gradient at every step (DDP): rotary networks leave this one as it is.
        self.positions = nn.Parameter(torch.zeros(size.max_length + 1, size.width), requires_grad=not self._is_relative)
        modulate = nn.Linear(size.width, 6 * size.width)
        self.time = nn.Sequential(nn.Linear(128, size.width), nn.SiLU(), modulate)
        self.rope: nn.Module | None = None
        self.absent: nn.Parameter | None = None
        self.blocks = nn.ModuleList(Block(size) for _ in range(0 if size.adapter_rank else size.layers))
        self.norm: nn.Module = nn.LayerNorm(size.width)
        if size.adapter_rank:
            self.blocks, self.rope, self.norm = adapted_parts(model, size.adapter_rank, size.width, size.layers, size.heads)
            # What p_θ reads where noise has left nothing of a token: it has never read nothing.
            self.absent = nn.Parameter(torch.zeros(size.width))
        nn.init.normal_(self.z_in.weight, std=dim**-0.5)
        nn.init.zeros_(self.z_in.bias)
        nn.init.zeros_(self.z0_in.weight)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.zeros_(modulate.weight)
        nn.init.zeros_(modulate.bias)

    @property
    def _is_relative(self) -> bool:
        return self.size.rotary or self.size.adapter_rank > 0

    def forward(self, z: Tensor, t: Tensor, alpha: Tensor, z0_prev: Tensor | None, condition: Tensor | None = None) -> Tensor:
        """Z (B, T, d), t and alpha (B, T), z0_prev (B, T, d) → (B, T + 1, width), the start position first.

        `condition` (B, width) joins the embedded time of every position, as DiT's class does (arXiv:2212.09748).
        """
        if z.shape[1] > self.size.max_length:
            raise ValueError(f"text of {z.shape[1]} tokens, this network was built for {self.size.max_length}")
        # `z0_in` has no bias, so that zeros are the same as nothing, but keep its weight in the graph (DDP).
        x = self.z_in(alpha[..., None] * z) + self.z0_in(torch.zeros_like(z) if z0_prev is None else z0_prev)
        if self.absent is not None:
            x = x + (1 - alpha)[..., None] * self.absent
        x = torch.cat([self.start.expand(len(x), 1, -1).to(x.dtype), x], 1)
        if not self._is_relative:
            x = x + self.positions[: x.shape[1]]
        time = self.time[0](_time_features(F.pad(t, (1, 0))))
        if condition is not None:
            time = time + condition[:, None].to(time.dtype)
        modulation = self.time[1:](time).unflatten(-1, (6, -1))
        shared: tuple[Any, ...] = ()
        if self.rope is not None:
            x = x.float()  # thirty blocks add to it; p_θ's matrices are in bfloat16
            shared = (self.rope(x, torch.arange(x.shape[1], device=x.device)[None]),)
        again = self.checkpointed and torch.is_grad_enabled()
        for block in self.blocks:
            given = (x, modulation, *shared)
            x = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False) if again else block(*given)
        normed: Tensor = self.norm(x)
        return normed

    @torch.no_grad()
    def init_from_lm(self, model: Any, bos_id: int, unit: float) -> None:
        """Copy a GPT-2-architecture model's blocks, norms and positions; attention becomes bidirectional. `unit`: of E.

        Adapted blocks are p_θ's own already, of Llama's architecture; then it is what lies around them.

        Raises:
            UserError: if the model is of another architecture or size.
        """
        if self.size.adapter_rank:
            table = model.get_input_embeddings().weight
            self.z_in.weight.copy_(torch.eye(table.shape[1]) * unit)
            self.start.copy_(table[bos_id])
            assert self.absent is not None
            mean = table.float().mean(0)
            self.absent.copy_(mean / mean.norm() * table.float().norm(dim=1).mean())
            return
        gpt = getattr(model, "transformer", None)
        config = model.config
        if gpt is None or not hasattr(gpt, "wte") or not hasattr(gpt, "wpe"):
            raise UserError(f"--model.init_args.init_from_lm: needs GPT-2's architecture, base_lm is a {type(model).__name__}")
        want = (config.n_embd, config.n_head, True)
        if (self.size.width, self.size.heads, self.size.layers <= config.n_layer) != want or self.size.rotary:
            raise UserError(
                "--model.init_args.init_from_lm: width and heads must be those of base_lm "
                f"({config.n_embd}, {config.n_head}), layers at most {config.n_layer}, rotary false"
            )
        table, n = gpt.wte.weight.float(), self.size.max_length + 1
        self.z_in.weight.copy_(torch.eye(table.shape[1]) * unit)
        self.start.copy_(table[bos_id])
        self.positions.copy_(gpt.wpe.weight[:n])
        self.norm.load_state_dict(gpt.ln_f.state_dict())
        blocks: Any = self.blocks
        for block, source in zip(blocks, gpt.h, strict=False):
            pairs = [(block.qkv, source.attn.c_attn), (block.out, source.attn.c_proj)]
            for linear, conv in [*pairs, (block.up, source.mlp.c_fc), (block.down, source.mlp.c_proj)]:
                linear.weight.copy_(conv.weight.T)
                linear.bias.copy_(conv.bias)
            block.norm_1.load_state_dict(source.ln_1.state_dict())
            block.norm_2.load_state_dict(source.ln_2.state_dict())


def _time_features(t: Tensor) -> Tensor:
    """(B, T) → (B, T, 128): cosines and sines of 1000 t (DiT's embedding of the time)."""
    rate = torch.exp(-math.log(10_000.0) * torch.arange(64, device=t.device) / 64)
    angle = 1000.0 * t[..., None] * rate
    return torch.cat([angle.cos(), angle.sin()], -1)


class DenoiserNetwork(nn.Module):
    """ε_ψ by way of logits over the vocabulary (see science.md, "Denoiser").

    logits_i = head(hidden_i) + (α/σ²) ⟨z_i, E⟩. The second term is the exact log-likelihood of z_i for each token (all
    rows have one norm; of raw ones (α²/2σ²) ‖E‖² is taken off), so the network learns only what the other positions say
    about token i: p(x_i | z) ∝ N(z_i; α E(x_i), σ²) p(x_i | z_{−i}).

    Args:
        embedding, schedule: E and the noise; frozen.
        size: of the transformer.
        tied_head: read out by ⟨W hidden, E⟩ instead of by a matrix of its own (V × width more parameters).
        n_labels: labels 1 … n_labels that texts may carry (see `labels.Labeller`), 0 standing for no label; 0 = none
            at all. Their embeddings begin at zero, where a labelled network is the unlabelled one.
        model: p_θ, where `size.adapter_rank` adapts its blocks; its output embedding is then the head.

    Raises:
        UserError: if `size.adapter_rank` does not fit the model (see `adapted`), or goes with a tied head.
    """

    def __init__(
        self, embedding: TokenEmbedding, schedule: Schedule, size: NetworkSize, tied_head: bool = False, n_labels: int = 0,
        model: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embedding, self.schedule, self.size, self.tied_head = embedding, schedule, size, tied_head
        self.trunk = Trunk(embedding.dim, size, model)
        self.labels = (
            nn.Embedding(n_labels + 1, size.width, _weight=torch.zeros(n_labels + 1, size.width)) if n_labels else None
        )
        if size.adapter_rank:
            if tied_head:
                raise UserError("--model.init_args.tied_head: true given, with adapter_rank the head is that of base_lm: false")
            self.head: nn.Linear = FrozenLinear(model.get_output_embeddings().weight)
            return
        self.head = nn.Linear(size.width, embedding.dim if tied_head else embedding.vocab_size)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    network_name = "denoiser"

    def multiplied(self) -> list[tuple[nn.Module, int]]:
        """What a `cost.Meter` watches; every read-out is a product with the embedding table too."""
        return [(self.trunk, weights_of(self.trunk)), (self.head, weights_of(self.head) + self.embedding.weight.numel())]

    def hidden(self, z: Tensor, t: Tensor, z0_prev: Tensor | None = None, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `readout` needs: hidden (B, T, width) and query (B, T, d) = (α/σ²) z, for raw rows (B, T, d + 1) with α²/σ².

        The state before a position reads it out, as in p_θ, so that p_θ's own weights are a sensible start (the shift
        of DiffuGPT, Gong et al., arXiv:2410.17891).
        """
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        condition = None
        if self.labels is not None:
            rows = self.labels(torch.zeros_like(z[:, 0, 0], dtype=torch.int64) if label is None else label)
            # Begun at zero, rows of this size would take Adam three times the steps to learn as much.
            condition = rows * self.size.width**0.5
        hidden = self.trunk(z, t, alpha, z0_prev, condition)[:, :-1]
        ratio = (alpha / sigma.square().clamp_min(1e-2))[..., None]
        query = ratio * z
        return hidden, query if self.embedding.normalise else torch.cat([query, alpha[..., None] * ratio], -1)

    def readout(self, hidden: Tensor, query: Tensor) -> Tensor:
        """Logits (…, V) float32 from rows of `hidden` and `query`."""
        weight, half_square = self.embedding.weight, self.embedding.half_square
        out = self.head(hidden)
        if half_square is not None or self.size.adapter_rank:
            out = out @ weight.T if self.tied_head else out
            # In bf16 the difference of two large numbers would say nothing of the token.
            with torch.autocast(query.device.type, enabled=False):
                query = query.float()
                if half_square is None:
                    return out.float() + query @ weight.T
                return out.float() + query[..., :-1] @ weight.T - query[..., -1:] * half_square
        if self.tied_head:
            return ((out + query) @ weight.T).float()
        return out.float() + (query @ weight.T).float()

    def forward(self, z: Tensor, t: Tensor, z0_prev: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        """Z (B, T, d), t (B, T), z0_prev (B, T, d) or None, label (B,) int64 or None (0) → logits (B, T, V) float32."""
        return self.readout(*self.hidden(z, t, z0_prev, label))

    @torch.no_grad()
    def init_from_lm(self, model: Any, bos_id: int) -> None:
        """Start from p_θ's own weights, its output embedding included (needs `tied_head: false`)."""
        if self.tied_head:
            raise UserError("--model.init_args.init_from_lm: needs tied_head: false")
        self.trunk.init_from_lm(model, bos_id, self.embedding.unit)
        if self.size.adapter_rank:
            return
        self.head.weight.copy_(model.get_output_embeddings().weight)  # type: ignore[operator]
