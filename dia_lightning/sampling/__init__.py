"""Samplers: pure functions over (predict, schedule, z, times, generator), kernels, and the
module that runs them on text.
"""

from dia_lightning.sampling.annealing import anneal
from dia_lightning.sampling.denoise_accept import DenoiseAcceptKernel
from dia_lightning.sampling.langevin import mala, ula
from dia_lightning.sampling.particle_gibbs import ParticleGibbsKernel
from dia_lightning.sampling.particles import Steering, smc
from dia_lightning.sampling.solvers import (
    SOLVERS,
    ancestral,
    ddim,
    dia,
    dia_literal,
    dpmpp_2m,
    sample,
)
from dia_lightning.sampling.suffix import SuffixRegeneration
from dia_lightning.sampling.tempering import Tempering

__all__ = [
    "SOLVERS", "DenoiseAcceptKernel", "ParticleGibbsKernel", "Steering", "SuffixRegeneration",
    "Tempering", "ancestral", "anneal", "ddim", "dia", "dia_literal", "dpmpp_2m", "mala", "sample",
    "smc", "ula",
]  # fmt: skip
