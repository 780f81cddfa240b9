"""Rows of measurements, kept as they finish, so that a benchmark goes on where it was stopped."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.theory import fill

DOC = ROOT / "docs" / "results.md"
Spec = Mapping[str, Any]
Row = dict[str, Any]


def options(
    what: str | None, kits: Sequence[str], seeds: Sequence[int], quick: str
) -> argparse.ArgumentParser:
    """The command line of a benchmark whose rows are kept; `quick` says what that measures."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--kits", nargs="+", default=list(kits), choices=list(kits))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    parser.add_argument("--minutes", type=float, help="begin no row after these")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    parser.add_argument("--doc", action="store_true", help="write into docs/results.md too")
    return parser


class Rows:
    """A JSON Lines file of rows: `spec`, everything that defines a measurement, its `figures`, and
    the machine. A row with the same spec is not measured again.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list[Row]()
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_text(encoding="utf-8") if path.exists() else ""
        kept = whole[: whole.rfind("\n") + 1]
        if kept != whole:  # the last row was cut off when a run was ended: it is measured again
            path.write_text(kept, encoding="utf-8")
        self.rows = [json.loads(line) for line in kept.splitlines()]

    def find(self, spec: Spec) -> Row | None:
        """The row of this spec, the newest."""
        return next((row for row in reversed(self.rows) if row["spec"] == _plain(spec)), None)

    def measure(
        self, specs: Sequence[Spec], of: Callable[[Any], Mapping[str, Any]], minutes: float | None
    ) -> bool:
        """Measure what is missing, in this order; False where `minutes` ended first."""
        missing = [spec for spec in specs if self.find(spec) is None]
        end = time.monotonic() + 60 * (float("inf") if minutes is None else minutes)
        for i, spec in enumerate(missing):
            if time.monotonic() > end:
                left = len(missing) - i
                print(f"{left} of {len(specs)} rows are left; the same command goes on with them")
                return False
            load, begin = os.getloadavg()[0], time.monotonic()
            figures = dict(of(spec))
            took = {"load_before": load, "row_seconds": time.monotonic() - begin}
            row = _plain({"spec": spec, "figures": figures, **machine(), **took})
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.rows.append(row)
            print(json.dumps({**row["spec"], **_short(row["figures"])}), flush=True)
        return True

    def of(self, specs: Iterable[Spec]) -> list[Row]:
        """The rows of these specs that are there."""
        return [row for spec in specs if (row := self.find(spec)) is not None]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _short(figures: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {k: v for k, v in figures.items() if type(v) in (int, float)}
    return {k: float(f"{v:.4g}") for k, v in numbers.items()}


def machine() -> dict[str, Any]:
    """What a row must say about where it was measured."""
    import torch

    found = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(found, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or "unknown", "processor": _processor(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def made_by(command: str, rows: Sequence[Row]) -> str:
    """The line below a table: command, seeds, machine, and how busy the machine was before."""

    def every(name: str) -> str:
        return ", ".join(dict.fromkeys(str(row[name]) for row in rows))

    seeds = ", ".join(sorted({str(row["spec"]["seed"]) for row in rows}))
    busy = max(row["load_before"] for row in rows)
    return (
        f"Made by `{command}`; seeds {seeds}; {every('cores')} cores ({every('processor')}),"
        f" threads: {every('threads')}, torch {every('torch')}; commit {every('commit')}; load of"
        f" the machine before a row at most {busy:.1f}."
    )


def cell(rows: Sequence[Row], name: str, digits: int, factor: float = 1.0) -> str:
    """Mean of a figure, and with several seeds their range."""
    values = [factor * row["figures"][name] for row in rows if row["figures"].get(name) is not None]
    values = [value for value in values if value == value]
    if not values:
        return "–"
    spread = f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def publish(folder: Path, name: str, title: str, body: str, doc: Path | None = DOC) -> None:
    """Write a table to `folder`/table.md, and into `doc`: in its place, or as a new section."""
    (folder / "table.md").write_text(f"## {title}\n\n{body}\n", encoding="utf-8")
    print(f"{body}\n\nwritten to {folder / 'table.md'}" + (f" and {doc}" if doc else ""))
    if doc is None:
        return
    text = doc.read_text(encoding="utf-8")
    if f"<!-- {name}: " not in text:
        made = f"<!-- {name}: made by `make {name}` -->"
        text = f"{text.rstrip()}\n\n## {title}\n\n{made}\n<!-- end of {name} -->\n"
    doc.write_text(fill(text, name, body), encoding="utf-8")
