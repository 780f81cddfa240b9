"""p_θ's own blocks as the denoiser's: frozen and shared with it, with low-rank adapters and
attention to the right beside.

Made bidirectional, attention trained to look left forgets what it knew, and takes billions of
tokens to learn it again (Gong et al., arXiv:2410.17891). So p_θ's own attention stays causal, and
what its heads see on the right is read out by a
matrix of its own that begins at zero: before any training the network is p_θ given what is on the
    left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_lightning.diffusion.attention import attend
from dia_lightning.diffusion.trunk import NetworkSize, Trunk, run_blocks
from dia_lightning.errors import UserError

_RIGHT_RANK = 32


class Shared:
    """A module of p_θ, lent: what holds it neither moves, copies nor saves it. There is one p_θ,
    which `BaseLM.to` moves.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self


class FrozenLinear(nn.Linear):
    """y = W x + b with p_θ's own W and b, if it has one, in its precision, read off the layer
    `source` of p_θ at every call.
    """

    def __init__(self, source: nn.Module) -> None:
        super(nn.Linear, self).__init__()  # no matrix of its own
        self.register_parameter("bias", None)
        self.shared = Shared(source)
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out, in)."""
        weight: Tensor = self.shared.module.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        bias = getattr(self.shared.module, "bias", None)
        return F.linear(x.to(self.weight.dtype), self.weight, bias)


class LowRank(nn.Module):
    """y = B A x, A and B of rank `rank`, in the precision of x; B begins at zero (LoRA, Hu et
    al., arXiv:2106.09685).
    """

    def __init__(self, n_in: int, n_out: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out, bias=False)
        nn.init.normal_(self.down.weight, std=n_in**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.weight.to(x.dtype)), self.up.weight.to(x.dtype))


class AdaptedLinear(FrozenLinear):
    """y = W x + B A x, W frozen (LoRA, eq. 3)."""

    def __init__(self, source: nn.Module, rank: int) -> None:
        super().__init__(source)
        self.low = LowRank(self.in_features, self.out_features, rank)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        return F.linear(x, self.weight) + self.low(x)  # type: ignore[no-any-return]


class AdaptedBlock(nn.Module):
    """Llama's block with more attention, to the right."""

    def __init__(self, layer: Any, rank: int) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.shared = Shared(layer)
        sources = {
            "q": attention.q_proj,
            "k": attention.k_proj,
            "v": attention.v_proj,
            "out": attention.o_proj,
        }
        sources |= {"gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj}
        self.linear = nn.ModuleDict(
            {name: AdaptedLinear(source, rank) for name, source in sources.items()}
        )
        self.right = LowRank(
            attention.o_proj.in_features, attention.o_proj.out_features, _RIGHT_RANK
        )

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """X (B, T, width) float32, rope: cosines and sines (1, T, D) → (B, T, width)."""
        layer = self.shared.module
        x = x + self._attended(_normed(x, layer.input_layernorm), rope)
        h = _normed(x, layer.post_attention_layernorm)
        return x + self.linear["down"](F.silu(self.linear["gate"](h)) * self.linear["up"](h))  # type: ignore[no-any-return]

    def _attended(self, h: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """What p_θ's heads see on the left as p_θ reads it, and what they see on the right,
        themselves included, anew.
        """
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        q, k, v = (
            self.linear[name](h).unflatten(-1, (-1, rope[0].shape[-1])).transpose(1, 2)
            for name in "qkv"
        )
        q, k = apply_rotary_pos_emb(q, k, *(part.to(q.dtype) for part in rope))
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
        seen = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).tril()
        left, right = (attend(q, k, v, mask).transpose(1, 2).flatten(2) for mask in (seen, seen.T))
        return self.linear["out"](left) + self.right(right)  # type: ignore[no-any-return]


def _normed(x: Tensor, norm: Any) -> Tensor:
    """In float32, also by a p_θ in bfloat16."""
    return F.rms_norm(x, norm.weight.shape, norm.weight.float(), norm.variance_epsilon)


class AdaptedTrunk(nn.Module):
    """`Trunk` of p_θ's blocks. Between them and the embeddings stands nothing that is trained but
    single vectors.

    One matrix there, or one that the noise time moves every block with (AdaLN), and Adam's first
    steps, as large in each of its thousands of entries, make p_θ's blocks forget. Of the noise they
    know by what they read: unit · (α z) and (1 − α) of `absent`, what stands where noise has left
    nothing of a token, as p_θ has never read nothing.

    Attributes:
        checkpointed: as for `Trunk`.
        unit: p_θ's table is about unit · E.
    """

    checkpointed = False
    unit: Tensor

    def __init__(self, size: NetworkSize, model: Any) -> None:
        """Raises UserError if there is no `model`, p_θ, or it is of another architecture or
        size.
        """
        super().__init__()
        _check_fits(size, model)
        config, self.size = model.config, size
        self.register_buffer("unit", torch.ones(()))
        self.start, self.absent, self.z0_in = (
            nn.Parameter(torch.zeros(size.width)) for _ in range(3)
        )
        self.blocks = nn.ModuleList(
            AdaptedBlock(layer, size.adapter_rank) for layer in model.model.layers[: size.layers]
        )
        self.rope = type(model.model.rotary_emb)(config)
        self.norm = nn.RMSNorm(size.width, eps=config.rms_norm_eps)
        with torch.no_grad():
            self.norm.weight.copy_(model.model.norm.weight)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        alpha: Tensor,
        z0_prev: Tensor | None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """As for `Trunk`; of the time, α is read only, and a `condition` is added to every
        position.
        """
        self.size.check_length(z.shape[1])
        read = alpha[..., None] * z + self.z0_in * (
            torch.zeros_like(z) if z0_prev is None else z0_prev
        )
        if condition is not None:
            read = read + condition[:, None]
        # Thirty blocks add to it in float32; p_θ's matrices are in bfloat16.
        x = (self.unit * read + (1 - alpha)[..., None] * self.absent).float()
        x = torch.cat([self.start.expand(len(x), 1, -1), x], 1)
        rope = self.rope(x, torch.arange(x.shape[1], device=x.device)[None])
        normed: Tensor = self.norm(
            run_blocks(self.blocks, self.checkpointed, x, rope).to(self.start.dtype)
        )
        return normed

    @torch.no_grad()
    def init_from_lm(self, model: Any, bos_id: int, unit: float) -> None:
        """What lies around the blocks, from p_θ's table. `unit`: of E."""
        table = model.get_input_embeddings().weight.float()
        self.unit.fill_(unit)
        self.start.copy_(table[bos_id])
        mean = table.mean(0)
        self.absent.copy_(mean / mean.norm() * table.norm(dim=1).mean())

    def fingerprint(self) -> str:
        """16 hex digits that tell p_θ's blocks from those of a model fine-tuned from it."""
        blocks: Any = self.blocks
        return fingerprint_of(block.shared.module for block in blocks)


@torch.no_grad()
def fingerprint_of(modules: Iterable[nn.Module]) -> str:
    """16 hex digits that tell the weights of `modules` from others: of each 4,096 entries, evenly
    spread, in bfloat16.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, weight in module.named_parameters():
            # Multiples of a prime (Knuth) see every row and column; an even stride could see a
            # single one.
            index = torch.arange(4096, device=weight.device) * 2_654_435_761 % weight.numel()
            some = weight.flatten()[index].bfloat16().cpu()
            digest.update(name.encode() + some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_fits(size: NetworkSize, model: Any) -> None:
    given = f"adapter_rank: {size.adapter_rank} given,"
    if model is None:
        raise UserError(f"{given} allowed: with the base model (`lm`) whose blocks are adapted")
    config = model.config
    if config.model_type != "llama":
        raise UserError(
            f"{given} allowed: 0; base_lm is a {type(model).__name__}, not of Llama's architecture"
        )
    has = (config.hidden_size, config.num_attention_heads, True)
    if (size.width, size.heads, size.layers <= config.num_hidden_layers) != has:
        raise UserError(
            f"{given} allowed: with width and heads of base_lm ({config.hidden_size},"
            f" {config.num_attention_heads}) and up to {config.num_hidden_layers} layers"
        )
    if config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
        raise UserError(f"{given} allowed: 0; base_lm has biases or an activation other than SiLU")


def make_trunk(dim: int, size: NetworkSize, model: Any) -> Trunk | AdaptedTrunk:
    """The trunk of that size over embeddings of dimension `dim`; `model`: p_θ, where its blocks
    are adapted.

    Raises:
        UserError: for an infiller, which is a denoiser's.
    """
    if size.trunk == "infiller":
        raise UserError("trunk: 'infiller' given, allowed: bidirectional, for a critic")
    return AdaptedTrunk(size, model) if size.adapter_rank else Trunk(dim, size)
