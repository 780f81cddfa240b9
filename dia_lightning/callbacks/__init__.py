"""Lightning callbacks."""

from dia_lightning.callbacks.average import WeightEMA
from dia_lightning.callbacks.export import Export
from dia_lightning.callbacks.samples import UnguidedSamples
from dia_lightning.callbacks.writer import PredictionWriter

__all__ = ["Export", "PredictionWriter", "UnguidedSamples", "WeightEMA"]
