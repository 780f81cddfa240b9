"""What the constructors and the draws of the baselines on p_θ refuse."""

from __future__ import annotations

from dia_lightning.resources import UserError
from dia_lightning.types import Prompts, must_go_on


def refuse_blanks(batch: Prompts, method: str) -> None:
    """Raises a UserError where a text is not free to its end: p_θ writes from left to right."""
    if bool(must_go_on(batch.prompt_mask).any()):
        raise UserError(f"--data.init_args: blanks or a length given, which {method} does not hold; see GuidedSamplerModule")
