"""How a reward's constructor refuses a value."""

from __future__ import annotations

from dia_lightning.errors import UserError


def require(holds: bool, name: str, given: object, allowed: str) -> None:
    """A `UserError` that names the argument `name`, what was given and what is allowed, unless
    `holds`.
    """
    if not holds:
        raise UserError(f"{name}: {given!r:.100} given, allowed: {allowed}")


def require_sign(sign: float) -> None:
    """`sign` turns a score into a reward: 1 where more is better, −1 where less is."""
    require(sign in (-1, 1), "sign", sign, "-1 or 1")
