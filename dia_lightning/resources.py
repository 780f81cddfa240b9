"""Where shipped files are and how YAML is read, the one exception that stands for a user's mistake, and signals."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

_PACKAGE = Path(__file__).resolve().parent
_SHIPPED = ("configs", "checkpoints")
# Begins a path in a configuration: the folder of the file itself, wherever that is.
HERE = "{here}"


# An argument that is a value although it begins with "-"; argparse before Python 3.14 knows no exponent.
NEGATIVE = re.compile(r"-(\.?\d|\.?inf\b|\.?nan\b)", re.IGNORECASE)


class UserError(Exception):
    """A mistake that the user can mend; the command prints it as one line and ends with exit code 2."""


class OptionParser(argparse.ArgumentParser):
    """Raises `UserError` where a command is called wrongly; an abbreviation of an option is none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._negative_number_matcher = NEGATIVE

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.partition(' ')[2]}: {message} (see `{self.prog} --help`)")

    def add_allow(self) -> None:
        """`--allow MODULE`, as for `parser.run`; a list."""
        self.add_argument(
            "--allow", action="append", default=[], type=module_name, metavar="MODULE",
            help="let options name classes of a module of yours; may be given several times",
        )  # fmt: skip


def module_name(text: str) -> str:
    """`text`, if it can be the name of a module, as `--allow` wants it.

    Raises:
        UserError: if it cannot, or it is the one that decides what is allowed.
    """
    if not all(part.isidentifier() for part in text.split(".")) or text.partition(".")[0] == "jsonargparse":
        raise UserError(f"--allow: {text or 'nothing'} given, needed is the name of your module, as in --allow my_rewards")
    return text


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


def is_shipped(path: str | Path) -> bool:
    """Whether `path` names a file or folder that comes with the package, and so is found everywhere."""
    return Path(path).parts[:1] in {(name,) for name in _SHIPPED} and any((root / path).exists() for root in shipped_roots())


def require_path(path: str | Path, option: str) -> Path:
    """Like `find_path`, but a path that exists nowhere is a `UserError` naming `option`."""
    found = find_path(path)
    if found is None:
        raise UserError(f"{option}: no such file or folder: {path} (looked in {Path.cwd()} and among the shipped files)")
    return found


@contextmanager
def in_place(path: Path) -> Iterator[Path]:
    """A neighbour of `path` to write to: it becomes `path` once it is whole, and goes where writing fails.

    Raises:
        OSError: that names `path`, whatever failed.
    """
    partial = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:  # safetensors has one of its own, with the system's number in its text
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


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


def placed(value: Any, folder: Path) -> Any:
    """`value`, as read from a file in `folder`: of every text in it that begins with `{here}/` that is made the folder."""
    if isinstance(value, str):
        return f"{folder}{value.removeprefix(HERE)}" if value.startswith(f"{HERE}/") else value
    if isinstance(value, list):
        return [placed(item, folder) for item in value]
    if isinstance(value, dict):
        return {name: placed(item, folder) for name, item in value.items()}
    if isinstance(value, argparse.Namespace):
        vars(value).update(placed(vars(value), folder))
    return value


def read_yaml(path: Path, option: str, **replaced: str) -> dict[str, Any]:
    """The options in a YAML file, each `{name}` of `replaced` in its text replaced, and `{here}` (see `placed`).

    Raises:
        UserError: naming the file, and the line where YAML breaks.
    """
    import yaml  # type: ignore[import-untyped]

    if not path.is_file():
        raise UserError(f"{option}: {path} is a folder, a YAML file is needed")
    try:
        text = path.read_text(encoding="utf-8")
        for name, value in replaced.items():
            text = text.replace(f"{{{name}}}", value)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: cannot read {path} as UTF-8 text ({error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{option}: {path}{where} is no YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{option}: {path} holds {content!r:.40}, needed are options (`name: value`, one a line)")
    found: dict[str, Any] = placed(content, path.absolute().parent)
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
