"""Samplers: pure functions over (predict, schedule, z, times, generator), and the module that runs them on text."""

from dia_lightning.sampling.denoise_accept import DenoiseAccept
from dia_lightning.sampling.module import GuidedSamplerModule
from dia_lightning.sampling.particle_gibbs import ParticleGibbs
from dia_lightning.sampling.particles import Steering, smc
from dia_lightning.sampling.solvers import SOLVERS, ancestral, dia

__all__ = [
    "SOLVERS", "DenoiseAccept", "GuidedSamplerModule", "ParticleGibbs", "Steering",
    "ancestral", "dia", "smc",
]  # fmt: skip
