"""Samplers: pure functions over (predict, schedule, z, times, generator), kernels, and the
module that runs them on text.
"""

from dia_lightning.sampling.annealing import anneal
from dia_lightning.sampling.denoise_accept import DenoiseAcceptKernel
from dia_lightning.sampling.langevin import mala, ula
from dia_lightning.sampling.particles import smc
from dia_lightning.sampling.suffix import SuffixRegeneration
from dia_lightning.sampling.tempering import Tempering

__all__ = [
    "DenoiseAcceptKernel",
    "ParticleGibbs",
    "SuffixRegeneration",
    "Tempering",
    "anneal",
    "mala",
    "smc",
    "ula",
]
