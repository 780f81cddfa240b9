"""Records: what is known of each text to be sampled, as the tasks need it, and prompts made of
them.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Any

from dia_lightning.data.sources import read_rows
from dia_lightning.errors import UserError
from dia_lightning.files import is_text
from dia_lightning.types import Record

Fields = Mapping[str, str | list[str]]


def read_records(
    source: str | Path,
    fields: Fields | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int | None = None,
    needs: Sequence[str] = (),
    argument: str = "prompts",
) -> list[Record]:
    """The records of a file, a corpus or a data set, in its order.

    Where the value of `prompt` or `source` is a list of strings, they are joined by a space;
    `references` is always a list, without empty texts.

    Args:
        source: a file: `.txt` (one prompt a line); `.csv` or `.tsv` with a header
            (`quoted:FILE.tsv`, if its cells are quoted as in CSV); `.jsonl`, `.parquet`, `.json` (a
            list of objects or prompts, or BOLD's nesting); `hub:NAME` or `hub:NAME:CONFIG`, a
            `datasets` data set, streamed; `gyafc:FOLDER:informal_to_formal` or
            `gyafc:FOLDER:formal_to_informal`, the corpus as it comes or one domain of it.
        fields: for each field of a record the column that holds it, or several columns whose texts
            make a list; `prompt.text` looks into a nested column, `prompts[]` makes a record of
            each element. Without it a record has all columns under their own names.
        split: which part of a data set of the hub or of GYAFC (`train`, `tune`, `test`).
        limit: how many records at most: the first ones, or with `seed` a random subset.
        seed: of that subset; the subset of a smaller limit is part of that of a larger one.
        needs: fields that every record must have, as a text.
        argument: that messages name.

    Raises:
        UserError: naming the file, the line and the fault; if the source is missing, of another
            kind, cannot be read as text, lacks a column, holds a value that is no text, or holds
            nothing.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} given, allowed: 1 or more")
    rows = read_rows(str(source), split, argument)
    records = (
        _checked(record, needs, where, argument)
        for where, row in rows
        for record in _records(row, fields, where, argument)
    )
    chosen = _choose(records, limit, seed)
    if not chosen:
        raise UserError(
            f"{argument}: {source} holds no prompt; leave it out to sample without prompts"
        )
    return chosen


def fill_template(template: str, record: Record) -> str:
    """`template` with each `{field}` replaced by that text of `record`; `{{` and `}}` stand for
    braces.

    `{field:N}` is its first N words, so that a document fits a model's window.

    Raises:
        UserError: if the template is malformed, or the record has no such field or holds no text
            there.
    """
    filled = ""
    for literal, field, n_words in _parts(template):
        filled += literal
        if field is None:
            continue
        value = record.get(field)
        if not isinstance(value, str):
            fault = "is no text" if field in record else "is not there"
            raise _template_error(
                template, f"{field!r} {fault}, fields: {', '.join(record) or 'none'}"
            )
        filled += " ".join(value.split()[:n_words]) if n_words else value
    return filled


def template_fields(template: str) -> list[str]:
    """The fields that `template` names, each once, in their order."""
    return list(dict.fromkeys(field for _, field, _ in _parts(template) if field is not None))


def _parts(template: str) -> list[tuple[str, str | None, int]]:
    """Each literal, the field after it, and the number of words that are taken of it (0: all)."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise _template_error(template, str(error)) from error
    for _, field, spec, conversion in parts:
        if field is not None and (
            not field.isidentifier()
            or conversion
            or not (spec or "0").isdecimal()
            or len(spec or "0") > 9
        ):
            raise _template_error(template, f"{{{field}}} is no plain name of a field in braces")
    return [(literal, field, int(spec or 0)) for literal, field, spec, _ in parts]


def _template_error(template: str, fault: str) -> UserError:
    return UserError(f"template: {template!r:.80} given, {fault}")


def _records(
    row: Mapping[str, Any], fields: Fields | None, where: str, argument: str
) -> Iterator[Record]:
    """The record of a row, or one for each element of a column that is named with `[]`."""
    if fields is None:
        yield {field: _value(field, value, where, argument) for field, value in row.items()}
        return
    many = [
        columns
        for columns in fields.values()
        if isinstance(columns, str) and columns.endswith("[]")
    ]
    elements = {columns: _column(row, columns[:-2], where) for columns in many}
    if (
        not all(isinstance(values, list) for values in elements.values())
        or len({*map(len, elements.values())}) > 1
    ):
        given = ", ".join(map(repr, many))
        raise UserError(
            f"fields: {given} given, allowed: columns that hold lists of one length; in"
            f" {where} they do not"
        )
    for i in range(len(elements[many[0]]) if many else 1):
        record: dict[str, Any] = {}
        for field, columns in fields.items():
            value: Any
            if isinstance(columns, str):
                value = (
                    elements[columns][i] if columns in elements else _column(row, columns, where)
                )
            else:
                value = [text for column in columns for text in _texts(_column(row, column, where))]
            record[field] = _value(field, value, where, argument)
            if record[field] in (None, "", []):
                raise UserError(f"{argument}: {where}: the field {field!r} is empty")
        yield record


def _column(row: Mapping[str, Any], column: str, where: str) -> Any:
    """The value of a column by its name, else by the dotted path into nested ones."""
    if column in row:
        return row[column]
    value: Any = row
    for key in column.split("."):
        if not isinstance(value, Mapping) or key not in value:
            has = ", ".join(map(str, row)) or "none"
            raise UserError(f"fields: no column {column!r} in {where}, columns there: {has}")
        value = value[key]
    return value


def _texts(value: Any) -> list[Any]:
    """`value` as a list without what is missing."""
    return [
        text
        for text in (value if isinstance(value, list) else [value])
        if text is not None and text != ""
    ]


def _value(field: str, value: Any, where: str, argument: str) -> Any:
    """A column's value as a record's field holds it."""
    if field not in ("prompt", "source", "references"):
        return value
    texts = [value] if value == "" else _texts(value)
    if not texts and field != "references":
        raise UserError(f"{argument}: {where}: the field {field!r} is empty")
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{argument}: {where}: the {field} is no string but {text!r:.60}")
        if not is_text(text):
            raise UserError(f"{argument}: {where}: the {field} is no text that UTF-8 can hold")
    return [text for text in texts if text] if field == "references" else " ".join(texts)


def _checked(record: Record, needs: Sequence[str], where: str, argument: str) -> Record:
    """`record`, after a look for the fields that are needed."""
    for field in needs:
        if not isinstance(record.get(field), str):
            has = ", ".join(record) or "none"
            raise UserError(
                f"{argument}: {where} has no text in the field {field!r}, fields there: {has}"
            )
    return record


def _choose(records: Iterable[Record], limit: int | None, seed: int | None) -> list[Record]:
    """The first `limit` records; with a seed those with the smallest of random numbers, one a
    record, in their order.
    """
    if seed is None or limit is None:
        return list(islice(records, limit))
    draw = random.Random(seed).random
    smallest = heapq.nsmallest(
        limit, ((draw(), i, record) for i, record in enumerate(records)), key=lambda item: item[:2]
    )
    return [record for _, record in sorted((i, record) for _, i, record in smallest)]
