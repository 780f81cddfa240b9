"""A denoiser that reads the left as p_θ does, and the right with a network of its own.

p(x_i | x_<i, z_>i): p_θ itself, unchanged, reads the left; a small transformer reads the right,
from right to left, noised where the text is; blocks of attention to what it has read add to p_θ's
last state before i, and what they add begins at zero: untrained, this is p_θ given the left.
Nothing is trained through p_θ, one pass teaches every position of a text, and what is read on the
right does not depend on what is drawn in a window: drafts of it share one reading, and p_θ's cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_lightning.diffusion.adapted import Shared, fingerprint_of
from dia_lightning.diffusion.attention import attend
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.trunk import NetworkSize, rotate, run_blocks
from dia_lightning.errors import UserError

_JOINTS = 2


class Right(NamedTuple):
    """What was read from the right: `states` (B, T + 1, width) of positions 0 … T − 1 and of the
    finish after them, their places (B, 1, T + 1), and which are `seen` (B, T + 1) bool.
    """

    states: Tensor
    place: Tensor
    seen: Tensor


class ReadingBlock(nn.Module):
    """GPT-2's block, which reads its own rows or others'."""

    def __init__(self, size: NetworkSize) -> None:
        super().__init__()
        width, self.heads = size.width, size.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.read = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for layer in (self.out, self.down):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, place: Tensor, seen: Tensor, right: Right | None = None) -> Tensor:
        """X (B, Q, width) at `place` (B, 1, Q), of `right` or of x those that are `seen` (B, 1, Q,
        S) → (B, Q, width).
        """
        h = self.norm_1(x)
        k, v = self.read(h if right is None else right.states).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.query(h), k, v))
        q, k = rotate(q, place), rotate(k, place if right is None else right.place)
        x = x + self.out(attend(q, k, v, seen).transpose(1, 2).flatten(2))
        fed: Tensor = self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))
        return x + fed


class InfillerTrunk(nn.Module):
    """`Trunk` whose hidden states are p_θ's own, moved by what stands on the right.

    Args:
        embedding: E.
        size: of the network that reads the right; `layers` of it, and two blocks that join the
            sides.
        model: p_θ, of any architecture with a linear head.

    Attributes:
        checkpointed: as for `Trunk`.
        unit: p_θ's table is about unit · E. start, absent: what p_θ reads before the text, and
            where noise has left nothing of a token.

    Raises:
        UserError: if there is no `model`, or its head is not linear.
    """

    checkpointed = False
    unit: Tensor
    start: Tensor
    absent: Tensor

    def __init__(self, embedding: TokenEmbedding, size: NetworkSize, model: Any) -> None:
        super().__init__()
        n_states = _states_of(model)
        dim, width = embedding.dim, size.width
        self.embedding, self.size, self.lm = embedding, size, Shared(model)
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("start", torch.zeros(dim))
        self.register_buffer("absent", torch.zeros(dim))
        self.z_in, self.z0_in = nn.Linear(dim, width), nn.Linear(dim, width, bias=False)
        self.hidden, self.finish = (nn.Parameter(0.1 * torch.randn(width)) for _ in range(2))
        self.state_in, self.next_in = nn.Linear(n_states, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(ReadingBlock(size) for _ in range(size.layers))
        self.joints = nn.ModuleList(ReadingBlock(size) for _ in range(_JOINTS))
        self.right_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.out = nn.Linear(width, n_states)
        for weight in (self.z0_in.weight, self.out.weight, self.out.bias):
            nn.init.zeros_(weight)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        alpha: Tensor,
        z0_prev: Tensor | None,
        condition: Tensor | None = None,
        left: Tensor | None = None,
    ) -> Tensor:
        """As for `Trunk`; of the time, α is read only, and the state after the last token is zero.

        With `left` (B, T) int64 p_θ reads these tokens, and z stands for the right alone: the state
        before each position is then that of a text known on its left, written so far say.
        """
        self.size.check_length(z.shape[1])
        rows = self._left_rows(z, t, alpha) if left is None else self._rows(left)
        right = self.read_right(z, t, alpha, z0_prev, condition)
        place = torch.arange(z.shape[1], device=z.device).expand(len(z), -1)
        return F.pad(self.join(self._states(rows), place, right), (0, 0, 0, 1))

    def read_right(
        self,
        z: Tensor,
        t: Tensor,
        alpha: Tensor,
        z0_prev: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Right:
        """Read z (B, T, d) from right to left."""
        read = self.z_in(alpha[..., None] * z) + (1 - alpha)[..., None] * self.hidden
        read = read + self.z0_in(torch.zeros_like(z) if z0_prev is None else z0_prev)
        x = torch.cat([read, self.finish.to(read.dtype).expand(len(z), 1, -1)], 1)
        if condition is not None:
            x = x + condition[:, None]
        seen = F.pad(~_repeated(z, t == 0), (0, 1), value=True)
        place = torch.arange(x.shape[1], device=z.device).expand(len(z), 1, -1).clone()
        # Wherever the row is cut, the finish comes after what is seen of it.
        place[:, 0, -1] = (place[:, 0, :-1] * seen[:, :-1] + seen[:, :-1]).amax(1)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=z.device).triu()
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=z.device)
        mask = (later & seen[:, None] | itself)[:, None]
        x = run_blocks(self.blocks, self.checkpointed, x, place, mask)
        return Right(self.right_norm(x), place, seen)

    def join(self, state: Tensor, place: Tensor, right: Right) -> Tensor:
        """P_θ's states (B, Q, H) before `place` (B, Q), moved by what stands right of it."""
        last = right.seen.shape[1] - 1
        next_place = torch.where(right.seen.gather(1, place + 1), place + 1, last)
        index = next_place[..., None].expand(-1, -1, right.states.shape[-1])
        x = self.state_in(state) + self.next_in(right.states.gather(1, index))
        at = torch.arange(last + 1, device=place.device)
        mask = ((at > place[..., None]) & right.seen[:, None])[:, None]
        x = run_blocks(self.joints, self.checkpointed, x, place[:, None], mask, right)
        return state + self.out(self.norm(x)).float()

    def _states(self, rows: Tensor) -> Tensor:
        """(B, T, H) float32, p_θ's last state before each of `rows` (B, T, d)."""
        start = self.start.to(rows.dtype).expand(len(rows), 1, -1)
        inputs = torch.cat([start, rows[:, :-1]], 1)
        body = self.lm.module.base_model
        states: Tensor = body(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return states.float()

    def _rows(self, tokens: Tensor) -> Tensor:
        rows: Tensor = self.lm.module.get_input_embeddings()(tokens)
        return rows

    def _left_rows(self, z: Tensor, t: Tensor, alpha: Tensor) -> Tensor:
        """What p_θ reads of a noised text: its own rows where the text is clean."""
        noised = self.unit * alpha[..., None] * z + (1 - alpha)[..., None] * self.absent
        clean, half_square = t == 0, self.embedding.half_square
        scores = z[clean] @ self.embedding.weight.T
        known = self._rows((scores if half_square is None else scores - half_square).argmax(-1))
        return noised.to(known.dtype).masked_scatter(clean[..., None], known)

    @torch.no_grad()
    def init_from_lm(self, model: Any, bos_id: int, unit: float) -> None:
        """What p_θ reads where there is no token. `unit`: of E."""
        table = model.get_input_embeddings().weight
        self.unit.fill_(unit)
        self.start.copy_(self._rows(torch.tensor([bos_id], device=table.device))[0])
        self.absent.copy_(table.float().mean(0))

    def fingerprint(self) -> str:
        """16 hex digits that tell p_θ from a model that was fine-tuned from it."""
        return fingerprint_of([self.lm.module.base_model])


def _repeated(z: Tensor, clean: Tensor) -> Tensor:
    """(B, T) bool, positions of z (B, T, d) with nothing but the token before them from there on:
    the ends that fill a row, of which one is read, so that a row says the same however long it is.
    """
    same = (z[:, 1:] == z[:, :-1]).all(-1) & clean[:, 1:] & clean[:, :-1]
    return F.pad(same.flip(1).long().cumprod(1).flip(1).bool(), (1, 0))


def _states_of(model: Any) -> int:
    """H, the size of the states that p_θ's head reads."""
    given = "trunk: infiller given,"
    if model is None:
        raise UserError(f"{given} allowed: with the base model (`lm`) that reads the left")
    head, body = model.get_output_embeddings(), getattr(model, "base_model", model)
    if head is None or body is model:
        raise UserError(
            f"{given} allowed: bidirectional; base_lm is a {type(model).__name__}, whose logits are"
            " not a linear head of its last states"
        )
    return int(head.weight.shape[1])
