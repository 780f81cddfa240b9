"""p_θ's own blocks as the denoiser's: frozen and shared with it, with low-rank adapters and attention to the right beside.

Made bidirectional, attention trained to look left forgets what it knew, and takes billions of tokens to learn it again
(Gong et al., arXiv:2410.17891). So p_θ's own attention stays causal, and what stands on the right comes through heads of its
own whose output begins at zero: before any training the network is p_θ given what is on the left.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_lightning.diffusion.attention import attend
from dia_lightning.resources import UserError

_RIGHT_HEADS = 2


class FrozenLinear(nn.Linear):
    """y = W x with p_θ's own W, shared with it, in its precision; no checkpoint repeats it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        del self.weight
        self.register_buffer("weight", weight.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight)


class AdaptedLinear(FrozenLinear):
    """y = W x + B A x, W frozen, A and B of rank `rank` (LoRA, Hu et al., arXiv:2106.09685, eq. 3); B begins at zero."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__(weight)
        self.down = nn.Linear(weight.shape[1], rank, bias=False)
        self.up = nn.Linear(rank, weight.shape[0], bias=False)
        nn.init.normal_(self.down.weight, std=weight.shape[1] ** -0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        low = F.linear(x, self.down.weight.to(x.dtype))
        return F.linear(x, self.weight) + F.linear(low, self.up.weight.to(x.dtype))


class _RightAttention(nn.Module):
    """Attention to a position itself and to those on its right; its output begins at zero (arXiv:2303.16199, § 3.2)."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * _RIGHT_HEADS * size, bias=False), nn.Linear(_RIGHT_HEADS * size, width)
        nn.init.normal_(self.qkv.weight, std=width**-0.5)
        for zero in (self.out.weight, self.out.bias):
            nn.init.zeros_(zero)

    def forward(self, h: Tensor, rope: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """H (B, T, width), rope (1, T, D) → (B, T, width)."""
        h = F.linear(h.to(dtype), self.qkv.weight.to(dtype))
        q, k, v = (part.unflatten(-1, (_RIGHT_HEADS, -1)).transpose(1, 2) for part in h.chunk(3, -1))
        q, k = _rotated(q, k, rope)
        attended = attend(q, k, v, _seen(h.shape[1], h.device).T).transpose(1, 2).flatten(2)
        return F.linear(attended, self.out.weight.to(dtype), self.out.bias.to(dtype))


def _rotated(q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = (part.to(q.dtype) for part in rope)
    return apply_rotary_pos_emb(q, k, cos, sin)  # type: ignore[no-any-return]


def _seen(length: int, device: torch.device) -> Tensor:
    """(T, T) bool, row i: the positions up to i."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class AdaptedBlock(nn.Module):
    """Llama's block with more attention to the right, its norms shifted, scaled and gated by the noise time (AdaLN)."""

    norm_1: Tensor
    norm_2: Tensor

    def __init__(self, layer: Any, rank: int) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.eps = layer.input_layernorm.variance_epsilon
        sources = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj, "out": attention.o_proj}
        sources |= {"gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj}
        self.linear = nn.ModuleDict({name: AdaptedLinear(source.weight, rank) for name, source in sources.items()})
        for name, norm in (("norm_1", layer.input_layernorm), ("norm_2", layer.post_attention_layernorm)):
            self.register_buffer(name, norm.weight.detach().float(), persistent=False)
        self.right = _RightAttention(len(self.norm_1), attention.head_dim)
        self.table = nn.Parameter(torch.zeros(6, len(self.norm_1)))

    def forward(self, x: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """X (B, T, width) float32, modulation (B, T, 6, width), rope: cosines and sines (1, T, D) → (B, T, width)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (modulation + self.table).unbind(2)
        h = F.rms_norm(x, self.norm_1.shape, self.norm_1, self.eps) * (1 + scale_1) + shift_1
        x = x + (1 + gate_1) * self._attended(h, rope)
        h = F.rms_norm(x, self.norm_2.shape, self.norm_2, self.eps) * (1 + scale_2) + shift_2
        return x + (1 + gate_2) * self.linear["down"](F.silu(self.linear["gate"](h)) * self.linear["up"](h))

    def _attended(self, h: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (self.linear[name](h).unflatten(-1, (-1, rope[0].shape[-1])).transpose(1, 2) for name in "qkv")
        q, k = _rotated(q, k, rope)
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
        left = attend(q, k, v, _seen(h.shape[1], h.device)).transpose(1, 2).flatten(2)
        return self.linear["out"](left) + self.right(h, rope, left.dtype)  # type: ignore[no-any-return]


def adapted_parts(model: Any, rank: int, width: int, layers: int, heads: int) -> tuple[nn.ModuleList, nn.Module, nn.Module]:
    """The first `layers` blocks of a model of Llama's architecture, its rotary positions and its last norm (trained anew).

    Raises:
        UserError: if the model is of another architecture or size.
    """
    config = model.config
    if config.model_type != "llama":
        raise UserError(f"--model.init_args.adapter_rank: needs Llama's architecture, base_lm is a {type(model).__name__}")
    if (width, heads, layers <= config.num_hidden_layers) != (config.hidden_size, config.num_attention_heads, True):
        raise UserError(
            "--model.init_args.adapter_rank: width and heads must be those of base_lm "
            f"({config.hidden_size}, {config.num_attention_heads}), layers at most {config.num_hidden_layers}"
        )
    if config.attention_bias or config.mlp_bias:
        raise UserError("--model.init_args.adapter_rank: base_lm has biases, which adapted blocks do not")
    blocks = nn.ModuleList(AdaptedBlock(layer, rank) for layer in model.model.layers[:layers])
    norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
    with torch.no_grad():
        norm.weight.copy_(model.model.norm.weight)
    return blocks, type(model.model.rotary_emb)(config), norm
