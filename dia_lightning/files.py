"""Text files as other programs write them, and cells as a spreadsheet leaves them alone."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dia_lightning.resources import UserError

# A cell that begins with one of these may be a formula; the last four are East Asian forms.
_FORMULA = tuple("=+-@＝＋－＠")


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: JSON and YAML can write one half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def lines(file: Path, option: str, newline: str | None = None) -> Iterator[tuple[int, str]]:
    r"""Each line of a UTF-8 file, or a UTF-16 one with a byte order mark: its number and the line.

    Args:
        file: to read.
        option: the option that gave it, for messages.
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
                    raise UserError(f"{option}: cannot read {file}, line {number} as {kind} text")
                if "\0" in line:
                    where = f"{file}, line {number}"
                    raise UserError(f"{option}: {where} holds a null byte, so it is no text")
                yield number, line
    except UnicodeError as error:
        where = f"{file} after line {number}"
        raise UserError(f"{option}: cannot read {where} as text ({error})") from error
    except OSError as error:
        raise UserError(f"{option}: cannot read {file} ({error.strerror})") from error


def json_lines(file: Path, option: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object on each line and where it stands; empty lines are left out.

    Only a line feed ends a line: other separators (U+2028, U+0085) may stand inside a string.
    """
    for number, line in lines(file, option, "\n"):
        if line.strip():
            where = f"{file}, line {number}"
            row = parse_json(line, where, option)
            if not isinstance(row, dict):
                raise UserError(f"{option}: {where} is no JSON object but {line.strip()!r:.60}")
            yield where, row


def parse_json(text: str, where: str, option: str, kind: str = "JSON object") -> Any:
    """The value that `text` writes; where it writes none, the message says that it is no `kind`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{option}: {where} is no {kind}: {reason:.100}") from error


def no_formula(cell: Any) -> Any:
    """`cell`, with an apostrophe before a text that a spreadsheet would run (OWASP, CSV injection)."""
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip().startswith(_FORMULA) else cell
