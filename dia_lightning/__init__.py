"""Sample text from π(x) ∝ p_θ(x) exp(λ r(x)) with a frozen language model.

>>> import dia_lightning as dia
>>> dia.sample(reward=lambda texts: [len(t) for t in texts], lam=0.1)  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dia_lightning import metrics, rewards, testing
    from dia_lightning.data import PromptData
    from dia_lightning.errors import UserError
    from dia_lightning.front.result import Result
    from dia_lightning.front.sample import sample
    from dia_lightning.lm.base_lm import BaseLM
    from dia_lightning.rewards import FunctionReward, check_reward
    from dia_lightning.samplers import (
        DDIM,
        Ancestral,
        Annealed,
        BaseModel,
        BestOfN,
        Chains,
        ClassifierFree,
        Critic,
        CriticGuidance,
        DenoiseAccept,
        DiaLiteral,
        Diffusion,
        DPMpp2M,
        GuidedDecoding,
        GuidedSamplerModule,
        ParticleGibbs,
        ParticleSteering,
        PredictorCorrector,
        RandomTokens,
        RewardGradient,
        RewardOnPrefix,
        Sampler,
        Source,
        Spans,
        Suffix,
        TwistedSMC,
        Unguided,
        WholeText,
        Window,
    )
    from dia_lightning.types import Reward

__version__ = "0.1.0"

__all__ = [
    "DDIM", "Ancestral", "Annealed", "BaseLM", "BaseModel", "BestOfN", "Chains", "ClassifierFree",
    "Critic", "CriticGuidance", "DPMpp2M", "DenoiseAccept", "DiaLiteral", "Diffusion",
    "FunctionReward",
    "GuidedDecoding", "GuidedSamplerModule", "ParticleGibbs", "ParticleSteering",
    "PredictorCorrector", "PromptData", "RandomTokens", "Result", "Reward", "RewardGradient",
    "RewardOnPrefix", "Sampler", "Source", "Spans", "Suffix", "TwistedSMC", "Unguided",
    "UserError", "WholeText", "Window", "check_reward", "metrics", "rewards", "sample", "testing",
]  # fmt: skip
_HOMES = {
    "sample": "front.sample", "Result": "front.result", "BaseLM": "lm", "Reward": "types",
    "UserError": "errors", "PromptData": "data", "FunctionReward": "rewards",
    "check_reward": "rewards",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """What is heavy to import, when it is asked for: the command's help needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("metrics", "rewards", "testing"):
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'samplers')}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
