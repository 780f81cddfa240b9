"""p_θ: loading, probing, reading and decoding a frozen language model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dia_lightning.lm.base_lm import BaseLM

__all__ = ["BaseLM"]


def __getattr__(name: str) -> Any:
    """What needs torch, when it is asked for: the command's help reads file names only."""
    if name in __all__:
        from dia_lightning.lm import base_lm

        return getattr(base_lm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
