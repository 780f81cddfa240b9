"""LightningDataModules."""

from dia_lightning.data.prompts import PromptData
from dia_lightning.data.rollouts import RolloutData
from dia_lightning.data.samples import ModelSamples
from dia_lightning.data.text import HubText, TextFiles

__all__ = ["HubText", "ModelSamples", "PromptData", "RolloutData", "TextFiles"]
