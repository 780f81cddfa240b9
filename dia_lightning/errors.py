"""The one exception that stands for a user's mistake, and signals."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# An argument of another of the run's objects, in the text of a message: `model.lr`.
OTHERS = re.compile(r"(?<![\w./'\"-])(?:model|data|trainer)(?:\.\w+)+")


class UserError(ValueError):
    """A mistake that the user can mend, in one line: "lr: -1 given, allowed: above 0".

    It begins with the name of the argument at fault. Arguments of the run's other objects are
    written `model.lr`, `data.n_texts` and `trainer.max_steps`. A command prints the options in
    place of these names (`settings.places`) and ends with exit code 2.
    """

    @property
    def argument(self) -> str:
        """The name that the message begins with; "" where it begins with none."""
        found = re.match(r"[a-z]\w*(\.\w+)*(?=: )", str(self))
        return found[0] if found else ""

    def rename(self, name: str) -> None:
        """Put `name` in place of `argument`."""
        self.args = (name + str(self)[len(self.argument) :],)


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """For a function that hands its argument on: `renamed(base_lm="policy")` makes a mistake in
    base_lm, raised inside, one in policy.
    """
    try:
        yield
    except UserError as error:
        if error.argument in names:
            error.rename(names[error.argument])
        raise


def require(name: str, given: object, holds: bool, allowed: str) -> None:
    """Raises the `UserError` of the argument `name` unless `holds`."""
    if not holds:
        shown = given if isinstance(given, str) and given.strip() else repr(given)
        raise UserError(f"{name}: {shown:.100} given, allowed: {allowed}")


def no_memory(error: BaseException) -> bool:
    """Python's own error, CUDA's, or what torch says on a CPU."""
    said = "can't allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError"
    return said or isinstance(error, MemoryError)


def root_user_error(error: BaseException | None) -> UserError | None:
    """The innermost `UserError` among an exception and its causes."""
    found = None
    while error is not None:
        found = error if isinstance(error, UserError) else found
        error = error.__cause__ or error.__context__
    return found


class Interrupts:
    """Ctrl-C and SIGTERM, which both raise KeyboardInterrupt wherever the program is.

    Python drops one that is raised inside a destructor or a callback of C code; it is raised again.

    Attributes:
        exit_code: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self) -> None:
        self.pressed, self.exit_code, self._process = False, 130, 0

    def watch(self) -> None:
        """From now on, in the main thread; what Python says of a dropped one is not shown."""
        self._process = os.getpid()
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self.terminate)
        sys.unraisablehook = self._unraisable

    @property
    def watching(self) -> bool:
        """Whether this process, and not one that it was forked from, called `watch`."""
        return self._process == os.getpid()

    def terminate(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGTERM."""
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            return  # the trainer is ending already
        self.pressed, self.exit_code = True, 143
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raises the KeyboardInterrupt that was dropped, if one was."""
        if self.pressed:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.default_int_handler(number, frame)

    def _unraisable(self, dropped: Any) -> None:
        if dropped.exc_type is not KeyboardInterrupt:
            sys.__unraisablehook__(dropped)
        elif self.pressed:
            again = signal.SIGTERM if self.exit_code == 143 else signal.SIGINT
            threading.Timer(0.05, os.kill, (os.getpid(), again)).start()


INTERRUPTS = Interrupts()
