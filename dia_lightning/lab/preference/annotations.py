"""People's choices from their files: Label Studio's JSON export, or a filled CSV file."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dia_lightning.errors import UserError
from dia_lightning.files import lines

CHOICES = ("1", "2", "tie")


class Vote(NamedTuple):
    """One person's choice for a pair; where: of the choice, for messages."""

    pair_id: str
    annotator: str
    choice: str
    where: str


def read_votes(paths: Sequence[Path], known: Collection[str]) -> dict[str, dict[str, str]]:
    """Choices by pair and annotator.

    Raises:
        UserError: for a file that is neither kind, an unknown pair, an unknown choice, or two
            different choices of one person for one pair.
    """
    votes: dict[str, dict[str, str]] = {}
    for path in paths:
        for vote in _label_studio(path) if path.suffix.lower() == ".json" else _csv(path):
            if vote.pair_id not in known:
                fault = f"the pair {vote.pair_id!r} is not in this export"
                raise UserError(f"--annotations: {vote.where}: {fault}")
            if vote.choice not in CHOICES:
                fault = f"choice {vote.choice!r} given, allowed: 1, 2, tie or empty"
                raise UserError(f"--annotations: {vote.where}: {fault}")
            given = votes.setdefault(vote.pair_id, {})
            if given.setdefault(vote.annotator, vote.choice) != vote.choice:
                both = f"{given[vote.annotator]!r} and {vote.choice!r}"
                fault = f"{vote.annotator!r} chose {both} for one pair"
                raise UserError(f"--annotations: {vote.where}: {fault}")
    return votes


def _csv(path: Path) -> Iterator[Vote]:
    """Rows with a choice. Spreadsheets may write another delimiter; the header tells it."""
    texts = [text for _, text in lines(path, "--annotations", "")]
    header = texts[0] if texts else ""
    delimiter = next((d for d in (",", ";", "\t") if d in header), ",")
    rows = csv.DictReader(texts, delimiter=delimiter)
    try:
        if not {"pair_id", "choice"} <= set(rows.fieldnames or ()):
            fault = "has no columns pair_id and choice; allowed: a filled pairs.csv, or .json"
            raise UserError(f"--annotations: {path} {fault}")
        for row in rows:
            if choice := (row["choice"] or "").strip().lower():
                annotator = (row.get("annotator") or "").strip() or path.stem
                where = f"{path}, line {rows.line_num}"
                yield Vote((row["pair_id"] or "").strip(), annotator, choice, where)
    except csv.Error as error:
        where = f"{path}, line {rows.line_num}"
        raise UserError(f"--annotations: cannot read {where} ({error})") from error


def _label_studio(path: Path) -> Iterator[Vote]:
    """Annotations of a JSON export (not JSON-MIN), without skipped and empty ones."""
    try:
        tasks = json.loads("".join(text for _, text in lines(path, "--annotations", "")))
        for task in tasks:
            for annotation in task["annotations"]:
                where = f"{path}, task {task.get('id', '?')}"
                skipped = annotation.get("was_cancelled")
                if choice := "" if skipped else _choice_of(annotation["result"]):
                    yield Vote(
                        str(task["data"]["pair_id"]), _annotator_of(annotation), choice, where
                    )
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        kind = "JSON export of Label Studio (JSON, not JSON-MIN)"
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--annotations: {path} is no {kind}: {reason}") from error


def _choice_of(result: Sequence[dict[str, Any]]) -> str:
    """1, 2, tie or "" from the results of an annotation; any other choice as it is.

    Relations, which have no `from_name`, and results of added controls are ignored.
    """
    found = []
    for item in result:
        control = item.get("from_name"), item["type"]
        if control == ("comparison", "pairwise"):
            selected = item["value"]["selected"]
            found.append({"left": "1", "right": "2"}.get(selected, str(selected)))
        elif control == ("tie", "choices"):
            found += item["value"]["choices"]
    return " and ".join(found)


def _annotator_of(annotation: dict[str, Any]) -> str:
    """E-mail address or number of the annotator."""
    by = annotation.get("completed_by", "unknown")
    return str(by.get("email") or by.get("id")) if isinstance(by, dict) else str(by)
