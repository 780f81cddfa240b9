"""How texts are drawn for a batch: the parts that a run is put together from, and what each is
handed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.errors import UserError, require
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.samplers.networks import RewardValue
from dia_lightning.types import Batch, Reward, must_go_on


class Models(NamedTuple):
    """The networks of a run, and its target.

    lm: p_θ. embedding: its tokens as the diffusion sees them. denoiser, critic: None where no part
    needs them; n_labels, how many classes the denoiser was trained with. reward: r, asked once a
    text.
    lam: λ. policy: another language model to be sampled.
    """

    lm: BaseLM
    embedding: TokenEmbedding
    denoiser: DenoiserNetwork | None
    critic: RewardValue | None
    reward: Reward
    lam: float
    n_labels: int = 0
    policy: BaseLM | None = None


class Drawn(NamedTuple):
    """What a sampler drew for a batch.

    tokens: (B, T) int64 in canonical form. accept_rate: (B,) share of accepted moves of a sampler
        that
    has them. diagnostics: further figures by name, one a text (B,).
    """

    tokens: Tensor
    accept_rate: Tensor | None = None
    diagnostics: dict[str, Tensor] | None = None


class Population(NamedTuple):
    """Weighted particles from which annealing to π begins, G populations of M.

    tokens: (G · M, T) int64 in canonical form, a population's side by side. log_w: (G, M) float64,
        log-weights with which they stand for p_θ exp(λ' r). lam: that λ'. log_z: (G,) float64, log
        of an unbiased estimate of E_{p_θ}[exp(λ' r)].
    """

    tokens: Tensor
    log_w: Tensor
    lam: float
    log_z: Tensor


class Part:
    """Settings of one piece of a sampler; which networks it needs at λ = `lam`, and what it
    refuses.

    `needs` gives names of "denoiser", "labels" (a denoiser with labels of the reward) and "critic".
    """

    name: ClassVar[str] = ""

    def needs(self, lam: float) -> Set[str]:
        """The networks without which this part cannot work."""
        return frozenset()

    def check(self, models: Models) -> None:
        """Raises the UserError of settings that do not fit these models."""


class Sampler(Part, ABC):
    """Draws texts for a batch. Settings only: networks, reward and λ come in `models`."""

    policy: str | None = None

    @property
    def method(self) -> str:
        """Its name in every output."""
        return self.name

    @abstractmethod
    def draw(self, models: Models, batch: Batch, generator: torch.Generator) -> Drawn:
        """Texts for a batch of prompts, with all randomness from `generator`."""


def require_counts(part: object, *names: str) -> None:
    """Settings that are 1 or more."""
    for name in names:
        require(name, getattr(part, name), getattr(part, name) >= 1, "1 or more")


def require_reverse_process(part: Any) -> None:
    """Settings that every run of the reverse process has: `steps`, `stagger` and `temperature`."""
    require_counts(part, "steps")
    require("stagger", part.stagger, 0 <= part.stagger <= 1e4, "0 or more, up to 10000")
    require("temperature", part.temperature, part.temperature > 0, "above 0")


def refuse_blanks(batch: Batch, sampler: Sampler) -> None:
    """Raises a UserError where a text is not free to its end: p_θ writes from left to right."""
    if bool(must_go_on(batch.prompt_mask).any()):
        raise UserError(
            f"prompts: blanks or a length given, but {type(sampler).__name__} writes from left to"
            " right; allowed: the sampler Diffusion or Source, with moves that need no suffix"
        )


def draw_base(
    lm: BaseLM, batch: Batch, generator: torch.Generator,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
) -> Drawn:  # fmt: skip
    """Samples of `lm`, by default of exactly its law, in its own precision whatever the
    trainer's.
    """
    with torch.autocast(batch.tokens.device.type, enabled=False):
        return Drawn(
            lm.generate(batch.tokens, batch.prompt_mask, generator, temperature, top_k, top_p)
        )
