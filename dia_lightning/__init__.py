"""Sample text from π(x) ∝ p_θ(x) exp(λ r(x)) with a frozen language model: diffusion-based
inference-time alignment.
"""

from typing import Any

__version__ = "0.1.0"

__all__ = ["GuidedSamplerModule"]


def __getattr__(name: str) -> Any:
    """What is heavy to import, when it is asked for: the command's help needs none of it."""
    if name in __all__:
        from dia_lightning import samplers

        return getattr(samplers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
