"""How likely a language model finds a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dia_lightning.errors import UserError, renamed
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.types import Reward, text_mask

# Longer texts are scored by their beginning, so that one of them does not widen the whole batch.
_MOST_TOKENS = 1024


class Perplexity(Reward):
    """The mean log-probability of a token, end token included, in nats: −log of the perplexity,
    never above 0.

    The empty text has one token, its end. Of a text longer than 1,024 tokens, or than the model can
    read, the beginning counts.

    Args:
        model: Hub id or folder of a causal language model; not p_θ itself, which the target
            contains already.
        device: Where the model runs: cpu, cuda or cuda:N.
        name: Label in outputs.

    Raises:
        UserError: if the model cannot be loaded, or there is no such device.
    """

    on_prefix = False

    def __init__(self, model: str, device: str = "cpu", name: str = "fluency") -> None:
        self.model, self.device, self.name = model, device, name
        with renamed(base_lm="model"):
            self._lm = BaseLM.load(model)
        try:
            self._lm.to(torch.device(device))
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"device: {device!r} given, allowed: a device that torch finds here ({error})"
            ) from error

    def __call__(self, texts: Sequence[str]) -> Tensor:
        longest = 1 + max((len(text.encode(errors="replace")) for text in texts), default=0)
        tokens = (
            self._lm.encode(texts, min(longest, _MOST_TOKENS, self._lm.max_length))
            if texts
            else torch.zeros(0, 1).long()
        )
        tokens = tokens.to(self._lm.device)
        n_tokens = text_mask(
            tokens, torch.zeros_like(tokens, dtype=torch.bool), self._lm.end_id
        ).sum(1)
        return (self._lm.log_prob(tokens) / n_tokens).float().cpu() if texts else torch.zeros(0)
