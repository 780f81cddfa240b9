"""p_θ's own blocks as the denoiser's: frozen and shared with it, with low-rank adapters and attention to the right beside.

Made bidirectional, attention trained to look left forgets what it knew, and takes billions of tokens to learn it again
(Gong et al., arXiv:2410.17891). So p_θ's own attention stays causal, and what its heads see on the right is read out by a
matrix of its own that begins at zero: before any training the network is p_θ given what is on the left.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_lightning.diffusion.attention import attend
from dia_lightning.diffusion.trunk import NetworkSize, Trunk, run_blocks
from dia_lightning.resources import UserError

_RIGHT_RANK = 32


class FrozenLinear(nn.Linear):
    """y = W x with p_θ's own W, shared with it, in its precision; no checkpoint repeats it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        del self.weight
        self.register_buffer("weight", weight.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight)


class LowRank(nn.Module):
    """y = B A x, A and B of rank `rank`, in the precision of x; B begins at zero (LoRA, Hu et al., arXiv:2106.09685)."""

    def __init__(self, n_in: int, n_out: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out, bias=False)
        nn.init.normal_(self.down.weight, std=n_in**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.weight.to(x.dtype)), self.up.weight.to(x.dtype))


class AdaptedLinear(FrozenLinear):
    """y = W x + B A x, W frozen (LoRA, eq. 3)."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__(weight)
        self.low = LowRank(weight.shape[1], weight.shape[0], rank)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        return F.linear(x, self.weight) + self.low(x)  # type: ignore[no-any-return]


class AdaptedBlock(nn.Module):
    """Llama's block with more attention, to the right."""

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
        self.right = LowRank(attention.o_proj.in_features, len(self.norm_1), _RIGHT_RANK)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """X (B, T, width) float32, rope: cosines and sines (1, T, D) → (B, T, width)."""
        x = x + self._attended(F.rms_norm(x, self.norm_1.shape, self.norm_1, self.eps), rope)
        h = F.rms_norm(x, self.norm_2.shape, self.norm_2, self.eps)
        return x + self.linear["down"](F.silu(self.linear["gate"](h)) * self.linear["up"](h))  # type: ignore[no-any-return]

    def _attended(self, h: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """What p_θ's heads see on the left as p_θ reads it, and what they see on the right, themselves included, anew."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        q, k, v = (self.linear[name](h).unflatten(-1, (-1, rope[0].shape[-1])).transpose(1, 2) for name in "qkv")
        q, k = apply_rotary_pos_emb(q, k, *(part.to(q.dtype) for part in rope))
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
        seen = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).tril()
        left, right = (attend(q, k, v, mask).transpose(1, 2).flatten(2) for mask in (seen, seen.T))
        return self.linear["out"](left) + self.right(right)  # type: ignore[no-any-return]


class AdaptedTrunk(nn.Module):
    """`Trunk` of p_θ's blocks. Between them and the embeddings stands nothing that is trained but single vectors.

    One matrix there, or one that the noise time moves every block with (AdaLN), and Adam's first steps, as large in each of
    its thousands of entries, make p_θ's blocks forget. Of the noise they know by what they read: unit · (α z) and
    (1 − α) of `absent`, what stands where noise has left nothing of a token, as p_θ has never read nothing.

    Attributes:
        checkpointed: as for `Trunk`.
        unit: p_θ's table is about unit · E.
    """

    checkpointed = False
    unit: Tensor

    def __init__(self, size: NetworkSize, model: Any) -> None:
        """Raises UserError if there is no `model`, p_θ, or it is of another architecture or size."""
        super().__init__()
        _check_fits(size, model)
        config, self.size = model.config, size
        self.register_buffer("unit", torch.ones(()))
        self.start, self.absent, self.z0_in = (nn.Parameter(torch.zeros(size.width)) for _ in range(3))
        self.blocks = nn.ModuleList(AdaptedBlock(layer, size.adapter_rank) for layer in model.model.layers[: size.layers])
        self.rope = type(model.model.rotary_emb)(config)
        self.norm = nn.RMSNorm(size.width, eps=config.rms_norm_eps)
        with torch.no_grad():
            self.norm.weight.copy_(model.model.norm.weight)

    def forward(self, z: Tensor, t: Tensor, alpha: Tensor, z0_prev: Tensor | None, condition: Tensor | None = None) -> Tensor:
        """As for `Trunk`; of the time, α is read only, and a `condition` is added to every position."""
        self.size.check_length(z.shape[1])
        read = alpha[..., None] * z + self.z0_in * (torch.zeros_like(z) if z0_prev is None else z0_prev)
        if condition is not None:
            read = read + condition[:, None]
        # Thirty blocks add to it in float32; p_θ's matrices are in bfloat16.
        x = (self.unit * read + (1 - alpha)[..., None] * self.absent).float()
        x = torch.cat([self.start.expand(len(x), 1, -1), x], 1)
        rope = self.rope(x, torch.arange(x.shape[1], device=x.device)[None])
        normed: Tensor = self.norm(run_blocks(self.blocks, self.checkpointed, x, rope))
        return normed

    @torch.no_grad()
    def init_from_lm(self, model: Any, bos_id: int, unit: float) -> None:
        """What lies around the blocks, from p_θ's table. `unit`: of E."""
        table = model.get_input_embeddings().weight.float()
        self.unit.fill_(unit)
        self.start.copy_(table[bos_id])
        mean = table.mean(0)
        self.absent.copy_(mean / mean.norm() * table.norm(dim=1).mean())


def _check_fits(size: NetworkSize, model: Any) -> None:
    option = "--model.init_args.adapter_rank:"
    if model is None:
        raise UserError(f"{option} {size.adapter_rank} given, needs the base model (`lm`) whose blocks are adapted")
    config = model.config
    if config.model_type != "llama":
        raise UserError(f"{option} needs Llama's architecture, base_lm is a {type(model).__name__}")
    has = (config.hidden_size, config.num_attention_heads, True)
    if (size.width, size.heads, size.layers <= config.num_hidden_layers) != has:
        raise UserError(
            f"{option} width and heads must be those of base_lm ({config.hidden_size}, {config.num_attention_heads}), "
            f"layers at most {config.num_hidden_layers}"
        )
    if config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
        raise UserError(f"{option} base_lm has biases or another activation than SiLU, adapted blocks do not")


def make_trunk(dim: int, size: NetworkSize, model: Any) -> Trunk | AdaptedTrunk:
    """The trunk of that size over embeddings of dimension `dim`; `model`: p_θ, where its blocks are adapted."""
    return AdaptedTrunk(size, model) if size.adapter_rank else Trunk(dim, size)
