"""A study file: the runs that answer one question, as a list of cells.

    title: "λ, the weight of the reward"
    question: "How much reward does a larger λ buy, and what does it cost?"
    config: configs/dia_{kit}.yaml
    set: {model.compare_base: false, data.n_texts: 64}   # the stated default, on top of the config
    seeds: [0, 1, 2]
    seconds: 6                                           # per cell on one thread; for `--dry-run`
    grid:
      λ: {model.lam: [0, 2, 4, 8]}                       # an axis: its label, option and values
    baseline: {λ: 8}                                     # the stated default among them

An axis with several options sets them together: `{model.lam: [1, 2], model.sampler.rounds: [1, 4]}`
has two values. Several axes make the product. An axis may also name its values, each with what it
sets, a config of its own, and a training before it:

    grid:
      method:
        best-of-16: {config: configs/baselines/best_of_n_{kit}.yaml, set: {model.sampler.n: 16}}
        PPO:
          fit: {config: configs/baselines/ppo_{kit}.yaml, set: {model.beta: 0.125}}
          config: configs/zero_shot_{kit}.yaml
          set: {model.sampler.policy: "{fit}", model.sampler.label: ppo}

`command: test` runs `lightning test` in place of `predict`. In values `{seed}` is the cell's seed,
`{cell}` its folder and `{fit}` the folder that its training exports to; `{kit}` anywhere is the
value of `--kit`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from dia_lightning import __version__
from dia_lightning.errors import UserError
from dia_lightning.files import read_yaml, require_path
from dia_lightning.lab.report.results import Study

_KINDS: dict[str, Any] = {
    "title": str, "question": str, "command": str, "config": str, "set": dict, "seeds": list,
    "seconds": int | float, "grid": dict, "baseline": dict,
}  # fmt: skip
_NEEDED = ("title", "question", "grid")
_COMMANDS = ("predict", "test")
# Where runs write, and their seed.
_SEEDS = {"seed_everything": "{seed}", "model.seed": "{seed}"}
_SAMPLING = {
    "trainer.default_root_dir": "{cell}", "trainer.callbacks.folder": "{cell}", **_SEEDS
}  # fmt: skip
_TRAINING = {
    "trainer.default_root_dir": "{cell}/fit", "trainer.callbacks.folder": "{fit}",
    "trainer.logger": False, **_SEEDS,
}  # fmt: skip


@dataclass(frozen=True)
class CellRun:
    """One command of a cell. options: without dashes, `{cell}`, `{fit}`, `{seed}` unreplaced."""

    command: str
    config: Path
    options: dict[str, Any]

    def arguments(self, cell: Path, seed: int) -> list[str]:
        """As on the command line."""
        known = {"{cell}": f"{cell}", "{fit}": f"{cell / 'fit' / 'export'}", "{seed}": f"{seed}"}
        made = []
        for name, value in self.options.items():
            if isinstance(value, str):
                for word, replacement in known.items():
                    value = value.replace(word, replacement)
            else:
                value = json.dumps(value, ensure_ascii=False)
            made.append(f"--{name}={value}")
        return [self.command, "--config", str(self.config), *made]

    def key(self, seed: int) -> str:
        """16 hexadecimal digits of the arguments, the config's content and our version."""
        arguments = self.arguments(Path("{cell}"), seed)
        arguments[2] = self.config.read_text(encoding="utf-8")
        return hashlib.sha256(json.dumps([__version__, *arguments]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Cell:
    """A setting (label → value) at one seed; `name` is its folder's, STUDY/SETTING/seed=K."""

    study: str
    setting: dict[str, Any]
    seed: int
    name: str
    folder: Path
    run: CellRun
    fit: CellRun | None = None

    @property
    def key(self) -> str:
        """Of everything that it runs."""
        return "-".join(run.key(self.seed) for run in (self.fit, self.run) if run is not None)


@dataclass(frozen=True)
class StudyGrid(Study):
    """A study file, read; axes: label → values. seconds: per cell, by the file."""

    cells: list[Cell] = field(default_factory=list, repr=False)
    seconds: float | None = None


class _Point(NamedTuple):
    """A value of an axis, its name in folders, and the settings that it stands for."""

    value: Any
    name: str
    set: dict[str, Any]
    config: str | None = None
    fit: dict[str, Any] | None = None


def read_study(
    path: Path, out: Path, kit: str = "tiny", seeds: Sequence[int] | None = None
) -> StudyGrid:
    """The study file `path`, whose cells write under `out`; `seeds` in place of the file's.

    Raises:
        UserError: naming the file and what is wrong in it.
    """
    content = read_yaml(path, "study", kit=kit)
    _check_keys(f"{path}", content, _KINDS)
    for name in _NEEDED:
        if name not in content:
            raise UserError(f"{path}: {name}: missing, needed are {', '.join(_NEEDED)}")
    command = content.get("command", "predict")
    if command not in _COMMANDS:
        raise UserError(f"{path}: command: {command} given, allowed: {', '.join(_COMMANDS)}")
    seeds = content.get("seeds", [0, 1, 2]) if seeds is None else seeds
    integers = all(type(seed) is int and seed >= 0 for seed in seeds)
    if not seeds or not integers or len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds: {seeds} given, allowed: different integers, 0 or more")
    grid = content["grid"]
    axes = {str(label): _axis(f"{path}: grid: {label}", values) for label, values in grid.items()}
    if not axes:
        raise UserError(f"{path}: grid: empty, an axis is needed")
    cells = []
    for points in product(*axes.values()):
        fit, run = _runs_of(str(path), command, content, points)
        setting = dict(zip(axes, (point.value for point in points), strict=True))
        for seed in seeds:
            name = f"{path.stem}/{','.join(point.name for point in points)}/seed={seed}"
            cells.append(Cell(path.stem, setting, seed, name, out / name, run, fit))
    values = {label: [point.value for point in points] for label, points in axes.items()}
    baseline = content.get("baseline", {})
    for label, value in baseline.items():
        if value not in values.get(label, []):
            raise UserError(f"{path}: baseline: {label} = {value} is not in the grid")
    text = path.read_text(encoding="utf-8").replace("{kit}", kit)
    told = (path.stem, content["title"], content["question"])
    return StudyGrid(*told, values, baseline, text, cells, content.get("seconds"))


def _check_keys(where: str, content: Any, allowed: dict[str, Any]) -> None:
    names = ", ".join(allowed)
    if not isinstance(content, dict):
        raise UserError(f"{where}: {content!r:.40} given, allowed are options: {names}")
    for key, value in content.items():
        if key not in allowed:
            raise UserError(f"{where}: {key}: unknown, allowed are {names}")
        if not isinstance(value, allowed[key]) or isinstance(value, bool):
            expected = getattr(allowed[key], "__name__", "number")
            raise UserError(f"{where}: {key}: {value!r:.40} given, allowed: {expected}")


def _axis(where: str, content: Any) -> list[_Point]:
    """The values of an axis: options with lists, or names with their settings."""
    if not isinstance(content, dict) or not content:
        allowed = "an option and its values, or named settings"
        raise UserError(f"{where}: {content!r:.40} given, allowed: {allowed}")
    if all(isinstance(value, dict) for value in content.values()):
        points = [_named(where, str(name), value) for name, value in content.items()]
    elif all(isinstance(value, list) for value in content.values()):
        if len({len(values) for values in content.values()}) > 1:
            raise UserError(f"{where}: options that are set together need as many values each")
        points = []
        for row in zip(*content.values(), strict=True):
            option, value = next(iter(content)).rpartition(".")[2], _plain(row[0])
            settings = dict(zip(content, row, strict=True))
            points.append(_Point(value, _slug(f"{option}={value}"), settings))
    else:
        allowed = "lists of values for options, or mappings for names, not both"
        raise UserError(f"{where}: allowed: {allowed}")
    if not points or len({point.name for point in points}) < len(points):
        differ = "values must be there and differ, also in the folders' names (letters and digits)"
        raise UserError(f"{where}: {differ}")
    return points


def _named(where: str, name: str, content: dict[str, Any]) -> _Point:
    _check_keys(f"{where}: {name}", content, {"config": str, "set": dict, "fit": dict})
    fit = content.get("fit")
    if fit is not None:
        _check_keys(f"{where}: {name}: fit", fit, {"config": str, "set": dict})
        if "config" not in fit:
            raise UserError(f"{where}: {name}: fit: config: missing")
    return _Point(name, _slug(name), content.get("set", {}), content.get("config"), fit)


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", text).strip("_.") or "_"


def _runs_of(
    where: str, command: str, content: dict[str, Any], points: Sequence[_Point]
) -> tuple[CellRun | None, CellRun]:
    """The training of a setting, if it has one, and the sampling."""
    own = [point.config for point in points if point.config]
    config = own[-1] if own else content.get("config")
    if config is None:
        setting = ", ".join(str(point.value) for point in points)
        raise UserError(f"{where}: config: none given for {setting}")
    options = dict(content.get("set", {}))
    for point in points:
        options |= point.set
    fits = [point.fit for point in points if point.fit]
    if len(fits) > 1:
        raise UserError(f"{where}: grid: only one axis may have a fit")
    run = CellRun(command, require_path(config, f"{where}: config"), options | _SAMPLING)
    if not fits:
        return None, run
    path = require_path(fits[0]["config"], f"{where}: fit: config")
    return CellRun("fit", path, fits[0].get("set", {}) | _TRAINING), run
