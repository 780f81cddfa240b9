"""Samplers: pure functions over (predict, schedule, z, times, generator), kernels, and what they
are made of.
"""

from dia_lightning.sampling.annealing import anneal
from dia_lightning.sampling.denoise_accept import DenoiserDrafts
from dia_lightning.sampling.drafts import SuffixDrafts, WindowDrafts
from dia_lightning.sampling.ensemble import Drafts, EnsembleKernel
from dia_lightning.sampling.langevin import mala, ula
from dia_lightning.sampling.particles import smc
from dia_lightning.sampling.tempering import Tempering

__all__ = [
    "DenoiserDrafts",
    "Drafts",
    "EnsembleKernel",
    "SuffixDrafts",
    "Tempering",
    "WindowDrafts",
    "anneal",
    "mala",
    "smc",
    "ula",
]
