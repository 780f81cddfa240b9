"""Guided decoding: p_θ's next tokens weighed by the critic's value of what they make of the
text.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dia_lightning.errors import require
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.lm.decoding import Decoding
from dia_lightning.numerics import draw_categorical
from dia_lightning.progress import steps
from dia_lightning.samplers.base import Drawn, Models, Sampler, refuse_blanks
from dia_lightning.samplers.prefix import PrefixValue, critic_of_prefixes, settled
from dia_lightning.types import Batch


def decode_guided(
    lm: BaseLM, tokens: Tensor, prompt_mask: Tensor, value: PrefixValue | None, lam: float,
    top_k: int, generator: torch.Generator, final: str = "sample",
) -> Tensor:  # fmt: skip
    """Texts whose next token v has log p_θ(v | x_<i) + λ h(x_<i v) among the k likeliest of p_θ.

    With all tokens and λ h(x_≤i) = log E[exp(λ r) | x_≤i] the texts are exact draws of π.

    Args:
        tokens: (B, T) with prompts as in `BaseLM.generate`. value: h; None or λ = 0 leaves p_θ's k
            likeliest as they are. top_k: k, 0 = all. final: the next token is drawn (`sample`) or
            the best one (`argmax`).

    Returns:
        (B, T) int64 in canonical form.
    """
    writing = Decoding(lm, tokens, prompt_mask)
    first = int(prompt_mask.sum(1).min())
    for place in steps(range(tokens.shape[1]), "tokens"):
        with torch.autocast(tokens.device.type, enabled=False):
            log_p = writing.next_logits().double().log_softmax(-1)
        log_p, candidates = log_p.topk(min(top_k or log_p.shape[1], log_p.shape[1]))
        if value is not None and lam and place >= first:
            rows = writing.rows.repeat_interleave(candidates.shape[1])
            prefixes = writing.tokens[rows]
            going = torch.where(writing.ended[:, None], lm.end_id, candidates)
            prefixes[:, place] = going.flatten()
            h = value(prefixes, settled(prefixes, prompt_mask[rows], place + 1, lm.end_id))
            log_p = log_p + lam * h.double().view_as(log_p)
        chosen = draw_categorical(log_p, generator) if final == "sample" else log_p.argmax(-1)
        writing.write(candidates.gather(1, chosen[:, None])[:, 0])
        if place % 8 == 7 and not writing.drop_ended():
            break
    return writing.text()


@dataclass(frozen=True)
class GuidedDecoding(Sampler):
    """Reward-guided decoding (ARGS, arXiv:2402.01694; RAD, arXiv:2310.09520).

    Each next token is drawn from the k likeliest of p_θ in proportion to p_θ exp(λ h), h the
    critic's value of the text up to that token, in units of the reward (see
    `prefix.critic_of_prefixes`).

    Args:
        top_k: Candidates for each token, k, and as many critic evaluations; 0 = the whole
            vocabulary.
        final: Next token: drawn (`sample`) or the best (`argmax`).
    """

    top_k: int = 10
    final: Literal["sample", "argmax"] = "sample"
    name: ClassVar[str] = "guided_decoding"

    def __post_init__(self) -> None:
        require("top_k", self.top_k, self.top_k >= 0, "0 or more")
        require("final", self.final, self.final in ("sample", "argmax"), "sample, argmax")

    def needs(self, lam: float) -> Set[str]:
        return {"critic"} if lam else frozenset()

    def draw(self, models: Models, batch: Batch, generator: torch.Generator) -> Drawn:
        refuse_blanks(batch, self)
        length, value = batch.tokens.shape[1], None
        if models.critic is not None:
            value = critic_of_prefixes(models.critic, models.embedding, length, generator)
        return Drawn(
            decode_guided(
                models.lm, batch.tokens, batch.prompt_mask, value, models.lam, self.top_k,
                generator, self.final,
            )
        )  # fmt: skip
