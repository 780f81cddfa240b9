"""LightningDataModules."""

from dia_lightning.data.prompts import PromptData, Reading
from dia_lightning.data.rollouts import RolloutData
from dia_lightning.data.samples import ModelSamples
from dia_lightning.data.text import HubSource, HubText, TextFiles

__all__ = [
    "HubSource",
    "HubText",
    "ModelSamples",
    "PromptData",
    "Reading",
    "RolloutData",
    "TextFiles",
]
