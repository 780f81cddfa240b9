"""Guided decoding: p_θ's next tokens weighed by the critic's value of what they would make of the text."""

from __future__ import annotations

import torch
from torch import Tensor

from dia_lightning.baselines.checks import check_lam, refuse_blanks
from dia_lightning.baselines.prefix import PrefixValue, critic_of_prefixes, settled
from dia_lightning.categorical import draw_categorical
from dia_lightning.lm import BaseLM
from dia_lightning.progress import steps
from dia_lightning.sampling.base import Drawn, SamplerModule, check
from dia_lightning.sampling.loading import embedding_for, load_value
from dia_lightning.types import Prompts, Reward
from dia_lightning.writing import Writing


def decode_guided(
    lm: BaseLM, tokens: Tensor, prompt_mask: Tensor, value: PrefixValue | None, lam: float, top_k: int,
    generator: torch.Generator, final: str = "sample",
) -> Tensor:  # fmt: skip
    """Texts whose next token v has log p_θ(v | x_<i) + λ h(x_<i v) among the k likeliest of p_θ.

    With all tokens and λ h(x_≤i) = log E[exp(λ r) | x_≤i] the texts are exact draws of π.

    Args:
        tokens: (B, T) with prompts as in `BaseLM.generate`. value: h; None or λ = 0 leaves p_θ's k likeliest as they are.
        top_k: k, 0 = all. final: the next token is drawn (`sample`) or the best one (`argmax`).

    Returns:
        (B, T) int64 in canonical form.
    """
    writing = Writing(lm, tokens, prompt_mask)
    first = int(prompt_mask.sum(1).min())
    for place in steps(range(tokens.shape[1]), "tokens"):
        with torch.autocast(tokens.device.type, enabled=False):
            log_p = writing.next_logits().double().log_softmax(-1)
        log_p, candidates = log_p.topk(min(top_k or log_p.shape[1], log_p.shape[1]))
        if value is not None and lam and place >= first:
            rows = writing.rows.repeat_interleave(candidates.shape[1])
            prefixes = writing.tokens[rows]
            prefixes[:, place] = torch.where(writing.ended[:, None], lm.end_id, candidates).flatten()
            h = value(prefixes, settled(prefixes, prompt_mask[rows], place + 1, lm.end_id))
            log_p = log_p + lam * h.double().view_as(log_p)
        chosen = draw_categorical(log_p, generator) if final == "sample" else log_p.argmax(-1)
        writing.write(candidates.gather(1, chosen[:, None])[:, 0])
        if place % 8 == 7 and not writing.drop_ended():
            break
    return writing.text()


class GuidedDecodingModule(SamplerModule):
    """Reward-guided decoding (ARGS, Khanov et al., arXiv:2402.01694; RAD, Deng and Raffel, arXiv:2310.09520).

    Each next token is drawn from the k likeliest of p_θ in proportion to p_θ exp(λ h), h the critic's value of the text up
    to that token, in units of the reward (see `prefix.critic_of_prefixes`).

    Args:
        reward: the reward to report, on which the critic was trained.
        base_lm: hub id or folder of p_θ.
        critic: checkpoint of that critic; needed unless lam is 0. A `soft` one is for the λ of its training.
        lam: λ, weight of the value; 0 = p_θ's own `top_k`.
        top_k: k, candidates for each token and critic evaluations too; 0 = the whole vocabulary.
        final: the next token is drawn (`sample`) or the best one (`argmax`).
        compare_base: sample p_θ for the same prompts too and report both.
        seed: of all randomness.
    """

    method = "guided_decoding"

    def __init__(
        self,
        reward: Reward,
        base_lm: str = "checkpoints/tiny/lm",
        critic: str | None = "checkpoints/tiny/critic",
        lam: float = 4.0,
        top_k: int = 10,
        final: str = "sample",
        compare_base: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(base_lm, reward, compare_base, seed)
        check_lam(lam)
        check("top_k", top_k, top_k >= 0, "0 or more")
        check("final", final, final in ("sample", "argmax"), "sample, argmax")
        self.critic, self.lam, self.top_k, self.final = critic, lam, top_k, final
        self.embedding = embedding_for(self.lm, critic=critic if lam else None)
        self.value = load_value(critic, self.embedding, reward.name, lam, self.lm) if lam else None

    def draw(self, batch: Prompts, generator: torch.Generator) -> Drawn:
        refuse_blanks(batch, type(self).__name__)
        length, value = batch.tokens.shape[1], None
        if self.value is not None:
            value = critic_of_prefixes(self.value, self.embedding, length, generator)
        tokens = decode_guided(self.lm, batch.tokens, batch.prompt_mask, value, self.lam, self.top_k, generator, self.final)
        return Drawn(tokens)
