"""Keep what a user can act on of the warnings and messages of other packages."""

from __future__ import annotations

import logging
import re

from dia_lightning.terminal import ignore_warnings

# What no user can act on: advertising, and what is absent.
_CHATTER = re.compile(
    r"Tip:|Seed set to|TPU available|GPU available: False|Automatic Mixed Precision|Detected"
    r" KeyboardInterrupt|"
    r"val_check_interval=1\)"
)


def quiet() -> None:
    """Keep what a user can act on."""
    ignore_warnings()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return _CHATTER.search(record.getMessage()) is None
