"""A transformer over noised embeddings with one noise time per token: what denoiser and critic
have in common.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dia_lightning.diffusion.attention import attend
from dia_lightning.errors import UserError

TRUNKS = ("bidirectional", "infiller")


@dataclass(frozen=True)
class NetworkSize:
    """Size of a transformer.

    Args:
        width: of the hidden states, a multiple of 2 × heads.
        layers: number of blocks.
        heads: attention heads in each.
        max_length: longest text in tokens, end token included.
        rotary: rotary positions instead of learned ones.
        adapter_rank: above 0 the blocks are p_θ's own, frozen and not repeated in checkpoints,
            with adapters of this rank on every matrix (see `adapted`; Llama's architecture only).
        trunk: `bidirectional`, or `infiller`: p_θ reads the left, a network of its own the right
            (see `infiller`; any base model with a linear head, denoiser only).
    """

    width: int = 128
    layers: int = 6
    heads: int = 4
    max_length: int = 40
    rotary: bool = False
    adapter_rank: int = 0
    trunk: str = "bidirectional"

    def __post_init__(self) -> None:
        for option in ("width", "layers", "heads", "max_length"):
            if getattr(self, option) < 1:
                raise UserError(f"{option}: {getattr(self, option)} given, allowed: 1 or more")
        if self.adapter_rank < 0:
            raise UserError(f"adapter_rank: {self.adapter_rank} given, allowed: 0 (none) or more")
        if self.trunk not in TRUNKS:
            raise UserError(f"trunk: {self.trunk!r} given, allowed: {', '.join(TRUNKS)}")
        if self.trunk == "infiller" and (self.adapter_rank or self.rotary):
            option = "adapter_rank" if self.adapter_rank else "rotary"
            raise UserError(
                f"{option}: {getattr(self, option)} given, allowed: {type(getattr(self, option))()}"
                " with trunk: infiller, which leaves p_θ's blocks as they are and has rotary"
                " positions of its own"
            )
        if self.width % (2 * self.heads):
            raise UserError(
                f"width: {self.width} given, allowed: multiples of 2 × heads ({self.heads})"
            )

    @property
    def needs_lm(self) -> bool:
        """Whether the network reads and is read out by p_θ's own matrices."""
        return self.adapter_rank > 0 or self.trunk == "infiller"

    def check_length(self, length: int) -> None:
        """ValueError for a text too long."""
        if length > self.max_length:
            raise ValueError(
                f"text of {length} tokens, this network was built for {self.max_length}"
            )

    def as_dict(self) -> dict[str, int | bool | str]:
        return asdict(self)


def rotate(x: Tensor, place: Tensor | None = None) -> Tensor:
    """Rotary positions (Su et al., arXiv:2104.09864): x (B, H, T, D), at 0 … T − 1 or at `place`
    (B, 1, T).
    """
    half = x.shape[-1] // 2
    rate = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    place = torch.arange(x.shape[2], device=x.device) if place is None else place
    angle = place[..., None] * rate
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    """GPT-2's block with attention in both directions, its norms shifted, scaled and gated by
    the noise time (AdaLN).
    """

    def __init__(self, size: NetworkSize) -> None:
        super().__init__()
        width = size.width
        self.heads, self.rotary = size.heads, size.rotary
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        # AdaLN-single (PixArt-α, arXiv:2310.00426): one projection of the time for all blocks plus
        # this table.
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
            q, k = rotate(q), rotate(k)
        attended = attend(q, k, v).transpose(1, 2).flatten(2)
        x = x + (1 + gate_1) * self.out(attended)
        hidden = F.gelu(self.up(self.norm_2(x) * (1 + scale_2) + shift_2), approximate="tanh")
        return x + (1 + gate_2) * self.down(hidden)


def run_blocks(blocks: nn.ModuleList, again: bool, x: Tensor, *shared: Any) -> Tensor:
    """The blocks one after another; with `again` they keep for the backward pass what went into
    them only.
    """
    for block in blocks:
        if again and torch.is_grad_enabled():
            x = checkpoint(block, x, *shared, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, *shared)
    return x


class Trunk(nn.Module):
    """Embeds noised tokens and their times and runs the blocks: the part that denoiser and critic
    have in common.

    A start position is put before the text, as p_θ has it. Inputs are α z, which fades with the
    noise, and the previous ẑ_0 (self-conditioning, Chen et al., arXiv:2208.04202).

    Attributes:
        checkpointed: keep of each block only what goes into it, and run it again in the backward
            pass (Chen et al., arXiv:1604.06174): less memory for a third more time.
    """

    checkpointed = False

    def __init__(self, dim: int, size: NetworkSize) -> None:
        """`dim`: of the embeddings."""
        super().__init__()
        self.size = size
        self.z_in = nn.Linear(dim, size.width)
        self.z0_in = nn.Linear(dim, size.width, bias=False)
        self.start = nn.Parameter(torch.zeros(size.width))
        # A trained parameter must have a gradient at every step (DDP): rotary networks leave this
        # one as it is.
        self.positions = nn.Parameter(
            torch.zeros(size.max_length + 1, size.width), requires_grad=not size.rotary
        )
        modulate = nn.Linear(size.width, 6 * size.width)
        self.time = nn.Sequential(nn.Linear(128, size.width), nn.SiLU(), modulate)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        nn.init.normal_(self.z_in.weight, std=dim**-0.5)
        nn.init.zeros_(self.z_in.bias)
        nn.init.zeros_(self.z0_in.weight)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.zeros_(modulate.weight)
        nn.init.zeros_(modulate.bias)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        alpha: Tensor,
        z0_prev: Tensor | None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Z (B, T, d), t and alpha (B, T), z0_prev (B, T, d) → (B, T + 1, width), the start
        position first.

        `condition` (B, width) joins the embedded time of every position, as DiT's class does
        (arXiv:2212.09748).
        """
        self.size.check_length(z.shape[1])
        # `z0_in` has no bias, so that zeros are the same as nothing, but keep its weight in the
        # graph (DDP).
        dtype = (
            self.start.dtype
        )  # of a trainer of another true precision, what comes in is float32 all the same
        z0 = torch.zeros_like(z) if z0_prev is None else z0_prev
        x = self.z_in((alpha[..., None] * z).to(dtype)) + self.z0_in(z0.to(dtype))
        x = torch.cat([self.start.expand(len(x), 1, -1).to(x.dtype), x], 1)
        if not self.size.rotary:
            x = x + self.positions[: x.shape[1]]
        time = self.time[0](_time_features(F.pad(t, (1, 0))).to(dtype))
        if condition is not None:
            time = time + condition[:, None].to(time.dtype)
        modulation = self.time[1:](time).unflatten(-1, (6, -1))
        normed: Tensor = self.norm(run_blocks(self.blocks, self.checkpointed, x, modulation))
        return normed

    @torch.no_grad()
    def init_from_lm(self, model: Any, bos_id: int, unit: float) -> None:
        """Copy a GPT-2-architecture model's blocks, norms and positions; attention becomes
        bidirectional. `unit`: of E.

        Raises:
            UserError: if the model is of another architecture or size.
        """
        gpt = getattr(model, "transformer", None)
        config = model.config
        if gpt is None or not hasattr(gpt, "wte") or not hasattr(gpt, "wpe"):
            raise UserError(
                f"init_from_lm: true given, allowed: false; base_lm is a {type(model).__name__},"
                " not of GPT-2's architecture"
            )
        want = (config.n_embd, config.n_head, True)
        if (
            self.size.width,
            self.size.heads,
            self.size.layers <= config.n_layer,
        ) != want or self.size.rotary:
            raise UserError(
                "init_from_lm: true given, allowed: with width and heads of base_lm "
                f"({config.n_embd}, {config.n_head}), up to {config.n_layer} layers, rotary false"
            )
        table, n = gpt.wte.weight.float(), self.size.max_length + 1
        self.z_in.weight.copy_(torch.eye(table.shape[1]) * unit)
        self.start.copy_(table[bos_id])
        self.positions.copy_(gpt.wpe.weight[:n])
        self.norm.load_state_dict(gpt.ln_f.state_dict())
        blocks: Any = self.blocks
        for block, source in zip(blocks, gpt.h, strict=False):
            pairs = [(block.qkv, source.attn.c_attn), (block.out, source.attn.c_proj)]
            for linear, conv in [
                *pairs,
                (block.up, source.mlp.c_fc),
                (block.down, source.mlp.c_proj),
            ]:
                linear.weight.copy_(conv.weight.T)
                linear.bias.copy_(conv.bias)
            block.norm_1.load_state_dict(source.ln_1.state_dict())
            block.norm_2.load_state_dict(source.ln_2.state_dict())


def _time_features(t: Tensor) -> Tensor:
    """(B, T) → (B, T, 128): cosines and sines of 1000 t (DiT's embedding of the time)."""
    rate = torch.exp(-math.log(10_000.0) * torch.arange(64, device=t.device) / 64)
    angle = 1000.0 * t[..., None] * rate
    return torch.cat([angle.cos(), angle.sin()], -1)
