"""p_θ: loading, probing, reading and decoding a frozen language model."""

from dia_lightning.lm.base_lm import BaseLM

__all__ = ["BaseLM"]
