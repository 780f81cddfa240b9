"""Keep what a user can act on of the warnings and messages of other packages."""

from __future__ import annotations

import logging
import re
import warnings

_IGNORED_WARNINGS = (
    "num_workers", r"isinstance\(treespec", "litlogger", "logging interval",
    "args parameter is intended", "Precision bf16-mixed is not", "The dirpath has changed",
    "WeightAveraging state cannot be restored", r"\s+Dump of a value that does not round-trip",
    "across ranks is zero", r"module\(s\) in eval mode", "ModelCheckpoint with manual optimization",
)  # fmt: skip
# What no user can act on: advertising, and what is absent.
_CHATTER = re.compile(
    r"Tip:|Seed set to|TPU available|GPU available: False|Automatic Mixed Precision|Detected"
    r" KeyboardInterrupt|"
    r"val_check_interval=1\)"
)


def quiet() -> None:
    """Keep what a user can act on."""
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return _CHATTER.search(record.getMessage()) is None
