"""Shipped files, text files as other programs write them, YAML, and files that appear whole."""

from __future__ import annotations

import argparse
import codecs
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dia_lightning.errors import UserError

# A cell that begins with one of these may be a formula; the last four are East Asian forms.
_FORMULA = tuple("=+-@＝＋－＠")


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: JSON and YAML can write one half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def lines(file: Path, argument: str, newline: str | None = None) -> Iterator[tuple[int, str]]:
    r"""Each line of a UTF-8 file, or a UTF-16 one with a byte order mark: its number and the line.

    Args:
        file: to read.
        argument: what messages call it.
        newline: as for `open`: None ends lines at "\n", "\r\n" and "\r" and gives each end as
            "\n"; "" ends them there too and keeps the ends; "\n" ends them at "\n" alone.

    Raises:
        UserError: naming the file and the line, if it cannot be read or is no text.
    """
    number = 0
    try:
        with file.open("rb") as content:
            wide = content.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding = "utf-16" if wide else "utf-8-sig"
        # What cannot be decoded becomes surrogates, so that the line is known where it stands.
        with file.open(encoding=encoding, errors="surrogateescape", newline=newline) as text:
            for number, line in enumerate(text, 1):
                if not is_text(line):
                    kind = "UTF-16" if wide else "UTF-8"
                    raise UserError(f"{argument}: cannot read {file}, line {number} as {kind} text")
                if "\0" in line:
                    where = f"{file}, line {number}"
                    raise UserError(f"{argument}: {where} holds a null byte, so it is no text")
                yield number, line
    except UnicodeError as error:
        where = f"{file} after line {number}"
        raise UserError(f"{argument}: cannot read {where} as text ({error})") from error
    except OSError as error:
        raise UserError(f"{argument}: cannot read {file} ({error.strerror})") from error


def json_lines(file: Path, argument: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object on each line and where it stands; empty lines are left out.

    Only a line feed ends a line: other separators (U+2028, U+0085) may stand inside a string.
    """
    for number, line in lines(file, argument, "\n"):
        if line.strip():
            where = f"{file}, line {number}"
            row = parse_json(line, where, argument)
            if not isinstance(row, dict):
                raise UserError(f"{argument}: {where} is no JSON object but {line.strip()!r:.60}")
            yield where, row


def parse_json(text: str, where: str, argument: str, kind: str = "JSON object") -> Any:
    """The value that `text` writes; where it writes none, the message says that it is no `kind`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{argument}: {where} is no {kind}: {reason:.100}") from error


def no_formula(cell: Any) -> Any:
    """`cell`, with an apostrophe before a text that a spreadsheet would run (OWASP, CSV
    injection).
    """
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip().startswith(_FORMULA) else cell


_PACKAGE = Path(__file__).resolve().parent


_SHIPPED = ("configs", "checkpoints")


# Begins a path in a configuration: the folder of the file itself, wherever that is.
HERE = "{here}"


def shipped_roots() -> list[Path]:
    """Folders that hold `configs/` and `checkpoints/`: a source tree first, then the installed
    wheel's data.
    """
    # An installed package lies in site-packages, where a folder `configs` would be somebody else's.
    roots = {_PACKAGE.parent: "pyproject.toml", _PACKAGE / "share": "configs"}
    return [root for root, sign in roots.items() if (root / sign).exists()]


def find_path(path: str | Path) -> Path | None:
    """The existing file or folder that `path` names: as given (relative to the current folder),
    else among shipped files.
    """
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
    """Whether `path` names a file or folder that comes with the package, and so is found
    everywhere.
    """
    return Path(path).parts[:1] in {(name,) for name in _SHIPPED} and any(
        (root / path).exists() for root in shipped_roots()
    )


def require_path(path: str | Path, argument: str) -> Path:
    """Like `find_path`, but a path that exists nowhere is a `UserError` naming `argument`."""
    found = find_path(path)
    if found is None:
        raise UserError(
            f"{argument}: no such file or folder: {path} (looked in {Path.cwd()} and among the"
            " shipped files)"
        )
    return found


@contextmanager
def in_place(path: Path) -> Iterator[Path]:
    """A neighbour of `path` to write to: it becomes `path` once it is whole, and goes where writing
    fails.

    Raises:
        OSError: that names `path`, whatever failed.
    """
    partial = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    except (
        Exception
    ) as error:  # safetensors has one of its own, with the system's number in its text
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def placed(value: Any, folder: Path) -> Any:
    """`value`, as read from a file in `folder`: of every text in it that begins with `{here}/`
    that is made the folder.
    """
    if isinstance(value, str):
        return f"{folder}{value.removeprefix(HERE)}" if value.startswith(f"{HERE}/") else value
    if isinstance(value, list):
        return [placed(item, folder) for item in value]
    if isinstance(value, dict):
        return {name: placed(item, folder) for name, item in value.items()}
    if isinstance(value, argparse.Namespace):
        vars(value).update(placed(vars(value), folder))
    return value


def read_yaml(path: Path, argument: str, **replaced: str) -> dict[str, Any]:
    """The options in a YAML file, each `{name}` of `replaced` in its text replaced, and `{here}`
    (see `placed`).

    Raises:
        UserError: naming the file, and the line where YAML breaks.
    """
    import yaml  # type: ignore[import-untyped]

    if not path.is_file():
        raise UserError(f"{argument}: {path} given, allowed: a YAML file; it is a folder")
    try:
        text = path.read_text(encoding="utf-8")
        for name, value in replaced.items():
            text = text.replace(f"{{{name}}}", value)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{argument}: cannot read {path} as UTF-8 text ({error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{argument}: {path}{where} is no YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{argument}: {path} given, allowed: a file of options (`name: value`, one a line); it"
            f" holds {content!r:.40}"
        )
    found: dict[str, Any] = placed(content, path.absolute().parent)
    return found
