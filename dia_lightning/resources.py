"""Where shipped files are, the one exception that stands for a user's mistake, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

_PACKAGE = Path(__file__).resolve().parent
_SHIPPED = ("configs", "checkpoints")


class UserError(Exception):
    """A mistake that the user can mend; the command prints it as one line and ends with exit code 2."""


def shipped_roots() -> list[Path]:
    """Folders that hold `configs/` and `checkpoints/`: a source tree first, then the installed wheel's data."""
    # An installed package lies in site-packages, where a folder `configs` would be somebody else's.
    roots = {_PACKAGE.parent: "pyproject.toml", _PACKAGE / "share": "configs"}
    return [root for root, sign in roots.items() if (root / sign).exists()]


def find_path(path: str | Path) -> Path | None:
    """The existing file or folder that `path` names: as given (relative to the current folder), else among shipped files."""
    if not str(path):
        return None
    try:
        given = Path(path).expanduser()
        # Only what ships: `runs/` of a source tree is not for runs started elsewhere.
        roots = shipped_roots() if given.parts[:1] in {(name,) for name in _SHIPPED} else []
        candidates = [given, *(root / given for root in roots)]
        return next((candidate for candidate in candidates if candidate.exists()), None)
    except (OSError, RuntimeError, ValueError):  # no name that a file can have, or `~nobody`
        return None


def require_path(path: str | Path, option: str) -> Path:
    """Like `find_path`, but a path that exists nowhere is a `UserError` naming `option`."""
    found = find_path(path)
    if found is None:
        raise UserError(f"{option}: no such file or folder: {path} (looked in {Path.cwd()} and among the shipped files)")
    return found


class Interrupts:
    """Remembers Ctrl-C: Python drops a KeyboardInterrupt that is raised inside a destructor or a callback of C code."""

    def __init__(self) -> None:
        self.pressed = False

    def watch(self) -> None:
        """From now on, in the main thread; what Python says of a dropped one is not shown."""
        signal.signal(signal.SIGINT, self._handle)
        sys.unraisablehook = self._unraisable

    def check(self) -> None:
        """Raises the KeyboardInterrupt that was dropped, if one was."""
        if self.pressed:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.default_int_handler(number, frame)

    @staticmethod
    def _unraisable(dropped: Any) -> None:
        if dropped.exc_type is not KeyboardInterrupt:
            sys.__unraisablehook__(dropped)


INTERRUPTS = Interrupts()
