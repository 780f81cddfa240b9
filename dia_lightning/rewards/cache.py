"""Scores that outlive the process."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from dia_lightning.errors import UserError

_AT_ONCE = 500  # below SQLite's limit on the parameters of one question
_LOCK_S = 60.0


class ScoreCache:
    """Scores by key in an SQLite file; several threads and processes may use one file at the same
    time.

    Args:
        path: the file, made where there is none; None keeps nothing.

    Raises:
        UserError: from every method, if the file cannot be made, read or written.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path

    def read(self, keys: Sequence[str]) -> dict[str, dict[str, float]]:
        """What is known of `keys`."""
        found: dict[str, dict[str, float]] = {}
        if self.path is None or not keys:
            return found
        with self._open() as database:
            for start in range(0, len(keys), _AT_ONCE):
                some = keys[start : start + _AT_ONCE]
                marks = ",".join("?" * len(some))
                rows = database.execute(
                    f"SELECT key, scores FROM scores WHERE key IN ({marks})", list(some)
                )
                found.update((key, json.loads(scores)) for key, scores in rows)
        return found

    def write(self, key: str, scores: dict[str, float]) -> None:
        if self.path is not None:
            with self._open() as database:
                database.execute(
                    "INSERT OR REPLACE INTO scores VALUES (?, ?)", (key, json.dumps(scores))
                )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # A connection a question: it belongs to one thread, and a reward that holds none can be
        # copied and pickled.
        assert self.path is not None
        try:
            Path(self.path).expanduser().parent.mkdir(parents=True, exist_ok=True)
            with (
                closing(sqlite3.connect(Path(self.path).expanduser(), timeout=_LOCK_S)) as database,
                database,
            ):
                database.execute(
                    "CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, scores TEXT NOT NULL)"
                )
                yield database
        except (sqlite3.Error, OSError, ValueError) as error:
            raise UserError(
                f"cache: {self.path} given, which cannot be used as a cache ({error})"
            ) from error
