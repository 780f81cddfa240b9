"""What guides the reverse process: nothing, a critic, the reward's own gradient, or a label."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from dia_lightning.errors import UserError, require
from dia_lightning.guidance import (
    CAP_MAX,
    LogValue,
    Predict,
    classifier_free,
    guided,
    true_gradient,
    unguided,
)  # fmt: skip
from dia_lightning.samplers.base import Models, Part


class Guidance(Part, ABC):
    """Turns the denoiser into one that follows the reward."""

    def needs(self, lam: float) -> Set[str]:
        return {"denoiser"}

    @abstractmethod
    def predictor(self, models: Models, temperature: float) -> Predict:
        """The denoiser as a solver asks it, its token distribution at `temperature`."""


@dataclass(frozen=True)
class Unguided(Guidance):
    """The denoiser as it is."""

    def predictor(self, models: Models, temperature: float) -> Predict:
        assert models.denoiser is not None
        return unguided(models.denoiser, models.embedding, temperature)


@dataclass(frozen=True)
class _GradientGuidance(Guidance):
    """A gradient added to the score (science.md, "Reverse process"); none where λ is 0.

    Args:
        scale: Factor on the gradient, above 0; 1 = the score of π. A critic's gradient falls short
            of the effect of a token's exchange (some fifteen times on the tiny kit): larger values
            make up for that.
        decay: Exponent of the factor (1 − u)^decay on guidance at noise level u, 0 or more; 0 = the
            same at all levels.
        cap: Largest norm of the guidance gradient of a token, above 0 (see `guidance.guided`).
        window: Noise levels u between which guidance acts, two numbers in [0, 1]; 0 = clean, 1 =
            noise.
    """

    scale: float = 1.0
    decay: float = 0.0
    cap: float = 100.0
    window: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        require("scale", self.scale, 0 < self.scale < float("inf"), "above 0, finite")
        require("decay", self.decay, 0 <= self.decay < float("inf"), "0 or more, finite")
        require("cap", self.cap, 0 < self.cap <= CAP_MAX, f"above 0, up to {CAP_MAX:g}")
        low, high = self.window
        allowed = "two numbers, 0 ≤ first < second ≤ 1"
        require("window", list(self.window), 0 <= low < high <= 1, allowed)

    def predictor(self, models: Models, temperature: float) -> Predict:
        network, embedding = models.denoiser, models.embedding
        assert network is not None
        predict = unguided(network, embedding, temperature)
        if not models.lam:
            return predict
        log_value, decay = self.log_value(models, temperature), self.decay
        factor = (lambda u: (1 - u) ** decay) if decay else None
        return guided(
            predict, log_value, network.schedule, embedding, self.cap, self.window, factor
        )

    def log_value(self, models: Models, temperature: float) -> LogValue:
        """λ times the value whose gradient guides."""
        raise NotImplementedError


@dataclass(frozen=True)
class CriticGuidance(_GradientGuidance):
    """Guidance by the gradient of a critic that was trained on the reward."""

    __doc__ = f"{__doc__}\n\n{_GradientGuidance.__doc__}"

    def needs(self, lam: float) -> Set[str]:
        return {"denoiser", "critic"} if lam else {"denoiser"}

    def log_value(self, models: Models, temperature: float) -> LogValue:
        factor, value = models.lam * self.scale, models.critic
        assert value is not None
        return lambda z, t: factor * value(z, t)


@dataclass(frozen=True)
class RewardGradient(_GradientGuidance):
    """Guidance by the gradient of the reward itself, through the denoiser: needs no critic.

    For a reward with a method `soft` (see `guidance.true_gradient`).

    Args:
        straight_through: Show the reward the likeliest tokens and pass its gradient to the
            probabilities: for rewards that cannot read a mixture of tokens.
    """

    straight_through: bool = False

    def check(self, models: Models) -> None:
        reward = _plain(models.reward)
        if not hasattr(reward, "soft"):
            raise UserError(
                f"guidance: RewardGradient given, but the reward {reward.name!r} has no method"
                " `soft`; allowed for it: CriticGuidance, Unguided"
            )
        if hasattr(reward, "check_tokenizer"):
            reward.check_tokenizer(models.lm.tokenizer)

    def log_value(self, models: Models, temperature: float) -> LogValue:
        factor, network = models.lam * self.scale, models.denoiser
        assert network is not None
        soft = _plain(models.reward)
        straight = self.straight_through
        return true_gradient(soft, network, models.embedding, factor, straight, temperature)


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """The score of p(z|y) (p(z|y) / p(z))^w, y a class of the reward (arXiv:2207.12598).

    At w = 0 the target is p_θ given that the reward lies in that class. For larger w these are the
    scores of no diffusion process: what the texts then follow is not known, only that they show
    more of the label and are less diverse. λ has no part in it.

    Args:
        label: Label to aim at, 1 to the denoiser's number of labels; null = the last, the class of
            the highest reward.
        scale: Guidance weight w, −1 or more; 0 = the labelled denoiser as it is, −1 = without the
            label.
    """

    label: int | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        require("scale", self.scale, -1 <= self.scale < float("inf"), "-1 or more, finite")

    def needs(self, lam: float) -> Set[str]:
        return {"denoiser", "labels"}

    def check(self, models: Models) -> None:
        n = models.n_labels
        ok = self.label is None or 1 <= self.label <= n
        require("label", self.label, ok, f"1 to {n}, or null for {n}")

    def predictor(self, models: Models, temperature: float) -> Predict:
        assert models.denoiser is not None
        y = models.n_labels if self.label is None else self.label
        return classifier_free(models.denoiser, models.embedding, y, self.scale, temperature)


def _plain(reward: Any) -> Any:
    """The reward itself, behind the memory of what it was asked."""
    return getattr(reward, "reward", reward)
