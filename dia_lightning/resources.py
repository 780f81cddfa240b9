"""Where shipped files are, and the one exception that stands for a user's mistake."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake that the user can mend; the command prints it as one line and ends with exit code 2."""


def shipped_roots() -> list[Path]:
    """Folders that hold `configs/` and `checkpoints/`: a source tree first, then the installed wheel's data."""
    return [root for root in (_PACKAGE.parent, _PACKAGE / "share") if (root / "configs").is_dir()]


def find_path(path: str | Path) -> Path | None:
    """The existing file or folder that `path` names: as given (relative to the current folder), else among shipped files."""
    given = Path(path).expanduser()
    if given.exists():
        return given
    if given.is_absolute():
        return None
    return next((root / given for root in shipped_roots() if (root / given).exists()), None)


def require_path(path: str | Path, option: str) -> Path:
    """Like `find_path`, but a path that exists nowhere is a `UserError` naming `option`."""
    found = find_path(path)
    if found is None:
        raise UserError(f"{option}: no such file or folder: {path} (looked in {Path.cwd()} and among the shipped files)")
    return found
