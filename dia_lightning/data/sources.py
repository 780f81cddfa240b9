"""Where records come from: rows of files of several kinds, of GYAFC's folders and of the hub,
each with its place.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dia_lightning.errors import UserError
from dia_lightning.files import json_lines, lines, parse_json, require_path

# Where a row stands, for messages, and its columns.
Row = tuple[str, Mapping[str, Any]]
# The same; a text alone where the file names no columns.
_Found = tuple[str, Mapping[str, Any] | str]
_Cells = Iterator[tuple[str, list[str]]]
_DOMAINS = ("Entertainment_Music", "Family_Relationships")
_DIRECTIONS = {
    "informal_to_formal": ("informal", "formal"),
    "formal_to_informal": ("formal", "informal"),
}
_HUB_AND_GYAFC = ", hub:NAME and gyafc:FOLDER:DIRECTION"


def read_rows(source: str, split: str, argument: str) -> Iterator[Row]:
    """The rows of a file, of `hub:NAME`, `hub:NAME:CONFIG` or `gyafc:FOLDER:DIRECTION`."""
    kind, _, name = source.partition(":")
    if kind == "hub":
        dataset, _, config = name.partition(":")
        return hub_rows(dataset, config or None, split, argument)
    if kind == "gyafc":
        folder, _, direction = name.rpartition(":")
        return gyafc_rows(folder, direction, split, argument)
    return file_rows(source, argument, "prompt", _HUB_AND_GYAFC)


def file_rows(source: str, argument: str, column: str, others: str = "") -> Iterator[Row]:
    """The rows of a file by its ending; `quoted:FILE.tsv` has the quotation marks of CSV.

    column: the name for texts of files without columns.
    others: what is allowed besides files, for the message.
    """
    name = source.removeprefix("quoted:")
    file = require_path(name, argument)
    ending = file.suffix.lower()
    if ending not in _READERS or (name != source and ending != ".tsv"):
        *kinds, last = _READERS
        files = f"files ending in {', '.join(kinds)} or {last}, quoted:FILE.tsv{others}"
        raise UserError(f"{argument}: {source} given, allowed: {files}")
    rows = quoted_tsv_rows(file, argument) if name != source else _READERS[ending](file, argument)
    return ((where, {column: row} if isinstance(row, str) else row) for where, row in rows)


def txt_rows(file: Path, argument: str) -> Iterator[_Found]:
    """Each line that is not empty, without the space around it."""
    for number, line in lines(file, argument):
        if text := line.strip():
            yield f"{file}, line {number}", text


def csv_rows(file: Path, argument: str) -> Iterator[Row]:
    """The rows of a file by RFC 4180."""
    return _under_header(_csv_cells(file, argument, ","), argument)


def quoted_tsv_rows(file: Path, argument: str) -> Iterator[Row]:
    """Those of one that has tabs in the place of commas."""
    return _under_header(_csv_cells(file, argument, "\t"), argument)


def tsv_rows(file: Path, argument: str) -> Iterator[Row]:
    """The rows of a file in which a row is a line and a quotation mark a plain character."""
    cells = (
        (f"{file}, line {n}", line.rstrip("\n").split("\t")) for n, line in lines(file, argument)
    )
    return _under_header(cells, argument, plain=True)


def _csv_cells(file: Path, argument: str, delimiter: str) -> _Cells:
    # The standard limit is 128 KiB a cell; for the whole process, since the module has no other.
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 28))
    texts = (line for _, line in lines(file, argument, ""))
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    start = 1
    try:
        for cells in reader:
            yield f"{file}, line {start}", cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{argument}: cannot read {file}, line {start} ({error})") from error


def _under_header(rows: _Cells, argument: str, plain: bool = False) -> Iterator[Row]:
    """Cells without the space around them, by the names in the first row; None for an empty one."""
    header: list[str] = []
    for where, cells in rows:
        if not any(map(str.strip, cells)):
            continue
        if not header:
            header = _header(cells, where, argument)
            if plain and all(name[:1] == name[-1:] == '"' for name in header):
                quoted = "the header is in quotation marks"
                raise UserError(f"{argument}: {where}: {quoted}; quoted:FILE.tsv reads such a file")
            continue
        if any(cell.strip() for cell in cells[len(header) :]):
            raise UserError(
                f"{argument}: {where} has {len(cells)} cells, the header names {len(header)}"
                " columns"
            )
        texts = [cell.strip() or None for cell in cells]
        yield (
            where,
            {name: text for name, text in zip_longest(header, texts[: len(header)]) if name},
        )


def _header(cells: list[str], where: str, argument: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    _no_name_twice(header, where, argument)
    return header


def _no_name_twice(names: list[str], where: str, argument: str) -> None:
    for name in filter(None, names):
        if names.count(name) > 1:
            raise UserError(f"{argument}: {where}: the header names the column {name!r} twice")


def parquet_rows(file: Path, argument: str) -> Iterator[Row]:
    """The rows as plain Python values: lists and structs are lists and dictionaries."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as content:
            _no_name_twice(content.schema_arrow.names, str(file), argument)
            rows = (row for batch in content.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"{file}, row {number}", row
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{argument}: cannot read {file} as parquet ({reason})") from error


def json_rows(file: Path, argument: str) -> Iterator[_Found]:
    """The elements of a list, objects or texts, as they are; or the prompts of BOLD's object."""
    text = "".join(line for _, line in lines(file, argument, ""))
    kind = "JSON document (JSON lines belong in a .jsonl file)"
    content = parse_json(text, str(file), argument, kind)
    if not isinstance(content, list):
        yield from bold_rows(content, file, argument)
        return
    for number, element in enumerate(content, 1):
        where = f"{file}, element {number}"
        if not isinstance(element, dict | str):
            kind = type(element).__name__
            raise UserError(f"{argument}: {where} is no JSON object or string but of type {kind}")
        yield where, element


def bold_rows(content: Any, file: Path, argument: str) -> Iterator[Row]:
    """`prompt`, `category` and `name` of BOLD's objects: category → name → list of prompts
    (arXiv:2101.11718).
    """
    if not isinstance(content, dict) or not all(
        isinstance(names, dict) for names in content.values()
    ):
        bold = "no JSON object of categories that hold names (BOLD)"
        raise UserError(f"{argument}: {file} is no JSON list of objects or strings, and {bold}")
    for category, names in content.items():
        for name, prompts in names.items():
            where = f"{file}, {category}/{name}"
            if not isinstance(prompts, list):
                raise UserError(f"{argument}: {where} is no list of prompts")
            for prompt in prompts:
                text = prompt.strip() if isinstance(prompt, str) else prompt
                if text != "":
                    yield where, {"prompt": text, "category": category, "name": name}


def hub_rows(dataset: str, config: str | None, split: str, argument: str) -> Iterator[Row]:
    """Rows of a data set that the library `datasets` finds under this name, streamed."""
    import datasets

    try:
        rows = datasets.load_dataset(dataset, config, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{dataset}, row {number}", row
    except Exception as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(f"{argument}: cannot stream {dataset!r} ({reason})") from error


def gyafc_rows(folder: str, direction: str, split: str, argument: str) -> Iterator[Row]:
    """`source`, `references` and `domain` of the GYAFC corpus (Rao and Tetreault 2018).

    DOMAIN/train has two files of parallel lines, `informal` and `formal`. In DOMAIN/tune and
    DOMAIN/test these are sentences
    of their own, each with four rewrites: those of `informal` in `formal.ref0` … `formal.ref3`, the
        other way round likewise.
    """
    if direction not in _DIRECTIONS:
        allowed = " or ".join(f"gyafc:FOLDER:{name}" for name in _DIRECTIONS)
        raise UserError(f"{argument}: gyafc:{folder}:{direction} given, allowed: {allowed}")
    root = require_path(folder, argument)
    domains = [root / name for name in _DOMAINS if (root / name).is_dir()] or [root]
    parts = [require_path(domain / split, argument) for domain in domains]
    source, target = _DIRECTIONS[direction]
    for domain, part in zip(domains, parts, strict=True):
        names = [target] if split == "train" else [f"{target}.ref{i}" for i in range(4)]
        files = [require_path(part / name, argument) for name in (source, *names)]
        columns = [[line.strip() for _, line in lines(file, argument, "\n")] for file in files]
        if len({len(column) for column in columns}) > 1:
            counts = ", ".join(
                f"{file.name} {len(column)}" for file, column in zip(files, columns, strict=True)
            )
            raise UserError(
                f"{argument}: files of {part} differ in their number of lines: {counts}"
            )
        for number, (text, *references) in enumerate(zip(*columns, strict=True), 1):
            yield (
                f"{files[0]}, line {number}",
                {
                    "source": text,
                    "references": references,
                    "domain": domain.name,
                },
            )


_READERS: dict[str, Callable[[Path, str], Iterator[_Found]]] = {
    ".txt": txt_rows, ".jsonl": json_lines, ".csv": csv_rows, ".tsv": tsv_rows,
    ".json": json_rows, ".parquet": parquet_rows,
}  # fmt: skip
