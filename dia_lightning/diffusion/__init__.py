"""The diffusion model over p_θ's token embeddings."""

from dia_lightning.diffusion.module import DenoiserModule

__all__ = ["DenoiserModule"]
