"""What is printed: control characters of data are shown, so that they cannot act on the
terminal.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# C0 but for tab and newline, DEL, C1, marks that turn the direction of writing, and halves of
# surrogate pairs.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# Of Lightning, that no user can act on.
_IGNORED_WARNINGS = (
    "num_workers", r"isinstance\(treespec", "litlogger", "logging interval",
    "args parameter is intended", "Precision bf16-mixed is not", "The dirpath has changed",
    "WeightAveraging state cannot be restored", r"\s+Dump of a value that does not round-trip",
    "across ranks is zero", r"module\(s\) in eval mode", "ModelCheckpoint with manual optimization",
)  # fmt: skip


def ignore_warnings() -> None:
    """Keep those warnings that a user can act on."""
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}.*")


def visible(text: str) -> str:
    r"""`text` with its control characters written as Python writes them; newlines and tabs stay.

    >>> visible("a\x1b[2K") == "a" + chr(92) + "x1b[2K"
    True
    """
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """`visible` with newlines as ⏎ and tabs as spaces, for a text in a row of its own."""
    return visible(text.replace("\r\n", "\n")).replace("\n", "⏎").replace("\t", " ")


def console() -> Console:
    """Rich's, for text that is data: no markup and no emoji in it, and `visible`. Give it plain
    `str`, no `Text`.
    """
    from rich.console import Console

    class Shown(Console):
        def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
            return super().render_str(visible(text), **{**options, "emoji": False, "markup": False})

    return Shown()
