"""Where records come from: rows of files of several kinds, of GYAFC's folders and of the hub, each with its place."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dia_lightning.resources import UserError, require_path

# Where a row stands, for messages, and its columns.
Row = tuple[str, Mapping[str, Any]]
_DOMAINS = ("Entertainment_Music", "Family_Relationships")
_DIRECTIONS = {"informal_to_formal": ("informal", "formal"), "formal_to_informal": ("formal", "informal")}


def read_rows(source: str, split: str, option: str) -> Iterator[Row]:
    """The rows of a file by its ending, of `hub:NAME`, `hub:NAME:CONFIG` or `gyafc:FOLDER:DIRECTION`."""
    kind, _, name = source.partition(":")
    if kind == "hub":
        return hub_rows(name, split, option)
    if kind == "gyafc":
        folder, _, direction = name.rpartition(":")
        return gyafc_rows(folder, direction, split, option)
    file = require_path(source, option)
    if file.suffix not in _READERS:
        *kinds, last = _READERS
        files = f"files ending in {', '.join(kinds)} or {last}"
        raise UserError(f"{option}: {source} given, allowed are {files}, hub:NAME and gyafc:FOLDER:DIRECTION")
    return _READERS[file.suffix](file, option)


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: JSON and YAML can write one half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def lines(file: Path, option: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers, ends included, without a byte order mark."""
    number = 0
    try:
        with file.open("rb") as content:
            # Cut at line feeds alone: other separators (U+2028, form feed) may stand inside a JSON string.
            for number, line in enumerate(content, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if "\0" in text:
                    raise UserError(f"{option}: {file}, line {number} holds a null byte, so it is no text")
                yield number, text
    except UnicodeDecodeError as error:
        raise UserError(f"{option}: cannot read {file}, line {number} as UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise UserError(f"{option}: cannot read {file} ({error.strerror})") from error


def txt_rows(file: Path, option: str) -> Iterator[Row]:
    """`prompt`: each line that is not empty, without the space around it."""
    for number, line in lines(file, option):
        if prompt := line.strip():
            yield f"{file}, line {number}", {"prompt": prompt}


def jsonl_rows(file: Path, option: str) -> Iterator[Row]:
    """Each line's object as it is; empty lines are left out."""
    for number, line in lines(file, option):
        if line.strip():
            where = f"{file}, line {number}"
            row = _json(line, where, option)
            if not isinstance(row, dict):
                raise UserError(f"{option}: {where} is no JSON object but {line.strip()!r:.60}")
            yield where, row


def table_rows(file: Path, option: str) -> Iterator[Row]:
    """Rows under a header, cells without the space around them; None where a cell is empty or lacking."""
    delimiter = "\t" if file.suffix == ".tsv" else ","
    # The standard limit is 128 KiB a cell; for the whole process, since the module has no other.
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 28))
    reader = csv.reader((line for _, line in lines(file, option)), delimiter=delimiter, strict=True)
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            where, start = f"{file}, line {start}", reader.line_num + 1
            if not any(map(str.strip, cells)):
                continue
            if not header:
                header = _header(cells, where, option)
                continue
            if any(cell.strip() for cell in cells[len(header) :]):
                raise UserError(f"{option}: {where} has {len(cells)} cells, the header names {len(header)} columns")
            texts = [cell.strip() or None for cell in cells]
            yield where, {name: text for name, text in zip_longest(header, texts[: len(header)]) if name}
    except csv.Error as error:
        raise UserError(f"{option}: cannot read {file}, line {start} ({error})") from error


def _header(cells: list[str], where: str, option: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    for name in header:
        if name and header.count(name) > 1:
            raise UserError(f"{option}: {where}: the header names the column {name!r} twice")
    return header


def bold_rows(file: Path, option: str) -> Iterator[Row]:
    """`prompt`, `category` and `name` of BOLD's objects: category → name → list of prompts (arXiv:2101.11718)."""
    content = _json("".join(line for _, line in lines(file, option)), str(file), option)
    if not isinstance(content, dict) or not all(isinstance(names, dict) for names in content.values()):
        raise UserError(f"{option}: {file} is no JSON object of categories that hold names (BOLD)")
    for category, names in content.items():
        for name, prompts in names.items():
            where = f"{file}, {category}/{name}"
            if not isinstance(prompts, list):
                raise UserError(f"{option}: {where} is no list of prompts")
            for prompt in prompts:
                text = prompt.strip() if isinstance(prompt, str) else prompt
                if text != "":
                    yield where, {"prompt": text, "category": category, "name": name}


def hub_rows(name: str, split: str, option: str) -> Iterator[Row]:
    """Rows of the `datasets` data set `NAME` or `NAME:CONFIG`, streamed."""
    import datasets

    dataset, _, config = name.partition(":")
    try:
        for number, row in enumerate(datasets.load_dataset(dataset, config or None, split=split, streaming=True), 1):
            yield f"{name}, row {number}", row
    except Exception as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(f"{option}: cannot stream {name!r} ({reason})") from error


def gyafc_rows(folder: str, direction: str, split: str, option: str) -> Iterator[Row]:
    """`source`, `references` and `domain` of the GYAFC corpus (Rao and Tetreault 2018).

    DOMAIN/train has two files of parallel lines, `informal` and `formal`. In DOMAIN/tune and DOMAIN/test these are sentences
    of their own, each with four rewrites: those of `informal` in `formal.ref0` … `formal.ref3`, the other way round likewise.
    """
    if direction not in _DIRECTIONS:
        allowed = " or ".join(f"gyafc:FOLDER:{name}" for name in _DIRECTIONS)
        raise UserError(f"{option}: gyafc:{folder}:{direction} given, allowed is {allowed}")
    root = require_path(folder, option)
    domains = [root / name for name in _DOMAINS if (root / name).is_dir()] or [root]
    parts = [require_path(domain / split, option) for domain in domains]
    source, target = _DIRECTIONS[direction]
    for domain, part in zip(domains, parts, strict=True):
        names = [target] if split == "train" else [f"{target}.ref{i}" for i in range(4)]
        files = [require_path(part / name, option) for name in (source, *names)]
        columns = [[line.strip() for _, line in lines(file, option)] for file in files]
        if len({len(column) for column in columns}) > 1:
            counts = ", ".join(f"{file.name} {len(column)}" for file, column in zip(files, columns, strict=True))
            raise UserError(f"{option}: files of {part} differ in their number of lines: {counts}")
        for number, (text, *references) in enumerate(zip(*columns, strict=True), 1):
            yield f"{files[0]}, line {number}", {"source": text, "references": references, "domain": domain.name}


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".txt": txt_rows, ".jsonl": jsonl_rows, ".csv": table_rows, ".tsv": table_rows, ".json": bold_rows,
}  # fmt: skip


def _json(text: str, where: str, option: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{option}: {where} is no JSON object ({reason:.100})") from error
