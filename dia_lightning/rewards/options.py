"""How a reward's constructor refuses a value."""

from __future__ import annotations

from dia_lightning.errors import require


def require_sign(sign: float) -> None:
    """`sign` turns a score into a reward: 1 where more is better, −1 where less is."""
    require("sign", sign, sign in (-1, 1), "-1 or 1")
