"""Samplers: pure functions over (predict, schedule, z, times, generator), and the module that runs them on text."""

from dia_lightning.sampling.module import GuidedSamplerModule
from dia_lightning.sampling.solvers import SOLVERS, ancestral, dia

__all__ = ["SOLVERS", "GuidedSamplerModule", "ancestral", "dia"]
