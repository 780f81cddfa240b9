"""Samplers and their parts: how texts are drawn, chosen by type and class path."""

from dia_lightning.samplers.annealed import Annealed
from dia_lightning.samplers.base import Drawn, Models, Sampler
from dia_lightning.samplers.base_model import BaseModel
from dia_lightning.samplers.best_of_n import BestOfN
from dia_lightning.samplers.chains import Chains
from dia_lightning.samplers.diffusion import Diffusion
from dia_lightning.samplers.guide import (
    ClassifierFree,
    CriticGuidance,
    Guidance,
    RewardGradient,
    Unguided,
)  # fmt: skip
from dia_lightning.samplers.guided_decoding import GuidedDecoding
from dia_lightning.samplers.module import GuidedSamplerModule
from dia_lightning.samplers.moves import DenoiseAccept, Move, Suffix, Window
from dia_lightning.samplers.particle_gibbs import ParticleGibbs
from dia_lightning.samplers.particle_steering import ParticleSteering
from dia_lightning.samplers.prefix import Critic, PrefixTwist, RewardOnPrefix
from dia_lightning.samplers.solver import (
    DDIM,
    Ancestral,
    DiaLiteral,
    DPMpp2M,
    PredictorCorrector,
    Solver,
)  # fmt: skip
from dia_lightning.samplers.source import Source
from dia_lightning.samplers.twisted_smc import TwistedSMC
from dia_lightning.sampling.positions import Positions, RandomTokens, Spans, WholeText

__all__ = [
    "DDIM", "Ancestral", "Annealed", "BaseModel", "BestOfN", "Chains", "ClassifierFree",
    "Critic", "CriticGuidance", "DPMpp2M", "DenoiseAccept", "DiaLiteral", "Diffusion", "Drawn",
    "Guidance", "GuidedDecoding", "GuidedSamplerModule", "Models", "Move", "ParticleGibbs",
    "ParticleSteering", "Positions", "PredictorCorrector", "PrefixTwist", "RandomTokens",
    "RewardGradient", "RewardOnPrefix", "Sampler", "Solver", "Source", "Spans", "Suffix",
    "TwistedSMC", "Unguided", "WholeText",
    "Window",
]  # fmt: skip
